"""Fixtures for all tests.

Kernels run in one of three ways, each in a separate process: interpreted (``TRITON_INTERPRET=1
pytest tests/kernels``, a variable that this file never sets, since it makes every other test very
slow), compiled (on a CUDA device), or compiled ahead of time (``tests/aot``).
"""

import gc
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

gc.disable()  # until all tests are imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # sums then have one order, also in processes that tests start
os.fsync = os.fstat  # no test cuts the power, and to wait for the disk is a quarter of a small run
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.distributed.fork_server import ForkServer, Origin  # noqa: E402

if INTERPRETED:
    from tests.support import interpreter

    interpreter.install()

ROOT = Path(__file__).parents[1]
NO_DEVICE = "no CUDA device"
NO_VLLM = "vLLM is absent; python3 tests/run.py serve installs it"
NOT_INTERPRETED = "Triton kernels need a CUDA device or TRITON_INTERPRET=1"

ORIGIN = pytest.StashKey[Origin]()


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # workers share that of the process that starts them
        config.stash[ORIGIN] = Origin()
        config.add_cleanup(config.stash[ORIGIN].close)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Tell a worker of pytest-xdist."""
    node.workerinput["forked_from"] = node.config.stash[ORIGIN].address


def pytest_collection_modifyitems(items):
    cuda, vllm = torch.cuda.is_available(), find_spec("vllm") is not None
    for item in items:
        if item.get_closest_marker("serve") and not vllm:
            item.add_marker(pytest.mark.skip(reason=NO_VLLM))
        if item.get_closest_marker("gpu") and not cuda:
            item.add_marker(pytest.mark.skip(reason=NO_DEVICE))
        if item.get_closest_marker("interpret") and not (cuda or INTERPRETED):
            item.add_marker(pytest.mark.skip(reason=NOT_INTERPRETED))


def pytest_collection_finish():
    """Let the collector skip what is imported: to look through it is a quarter of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 25, 100)
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # libraries report what is left at the end


@pytest.fixture
def device() -> torch.device:
    """The device for test tensors: CUDA if available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The ``shared`` folder of models and texts; skips the test without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared is absent")
    return folder


@pytest.fixture
def proof_in_process(monkeypatch):
    """Let ``verify`` open checkpoints in this process: a fresh one imports for seconds."""
    from prunekit.evaluation import proof

    monkeypatch.setattr(
        proof, "_in_fresh_process", lambda checkpoint: proof._here(checkpoint.folder)
    )


@pytest.fixture
def no_page(monkeypatch):
    """Skip drawing the HTML report, which other tests cover."""
    monkeypatch.setattr("prunekit.reports.report.render", lambda report: "")


@pytest.fixture(scope="session")
def forked_from(request) -> str:
    """The address of the process that fork servers are forked from."""
    given = getattr(request.config, "workerinput", None)
    return given["forked_from"] if given else request.config.stash[ORIGIN].address


@pytest.fixture(scope="session")
def fork_server(forked_from):
    """A process from which worlds of ranks are forked."""
    made = ForkServer(forked_from)
    yield made
    made.close()


@pytest.fixture(scope="session")
def stock_server(forked_from):
    """A process with transformers and without prunekit, from which scripts are forked."""
    made = ForkServer(forked_from, stock=True)
    yield made
    made.close()


@pytest.fixture
def forked_proof(monkeypatch, stock_server, tmp_path):
    """Fork the process in which ``verify`` opens checkpoints: a fresh one imports for seconds."""
    script = (
        "import os, runpy, sys; sys.argv, paths = arguments[1:], arguments[0].split(os.pathsep); "
        "sys.path[:] = paths + sys.path; runpy.run_path(sys.argv[0], run_name='__main__')"
    )

    def run(command, *, env, **_):
        paths, given = env["PYTHONPATH"], command[2:]
        world = stock_server.start(tmp_path / "proof", 1, script, paths, *given)
        (code,) = world.wait()
        return subprocess.CompletedProcess(command, code, b"", world.stderr(0).encode())

    monkeypatch.setattr(subprocess, "run", run)
