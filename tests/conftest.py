"""Fixtures for all tests.

Kernels run in one of three ways, each in a separate process: interpreted (``TRITON_INTERPRET=1
pytest tests/kernels``, a variable that this file never sets, since it makes every other test very
slow), compiled (on a CUDA device), or compiled ahead of time (``tests/aot``).
"""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

import pytest  # noqa: E402
import torch  # noqa: E402

if INTERPRETED:
    from tests.support import interpreter

    interpreter.install()

ROOT = Path(__file__).parents[1]
NO_DEVICE = "no CUDA device"
NOT_INTERPRETED = "Triton kernels need a CUDA device or TRITON_INTERPRET=1"


def pytest_collection_modifyitems(items):
    cuda = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not cuda:
            item.add_marker(pytest.mark.skip(reason=NO_DEVICE))
        if item.get_closest_marker("interpret") and not (cuda or INTERPRETED):
            item.add_marker(pytest.mark.skip(reason=NOT_INTERPRETED))


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


@pytest.fixture(scope="session")
def fork_server():
    """A process from which worlds of ranks are forked."""
    from tests.distributed.fork_server import ForkServer

    made = ForkServer()
    yield made
    made.close()
