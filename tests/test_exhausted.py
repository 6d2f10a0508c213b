"""Memory that is used up in any phase: one error, nothing is lost, and the work can go on."""

from itertools import cycle

import pytest

import prunekit
from prunekit.cli.main import main
from prunekit.config.run_config import Config
from prunekit.errors import CapacityError
from prunekit.evaluation import perplexity
from prunekit.evaluation.inspect import inspect
from prunekit.evaluation.verify import verify
from prunekit.inference.convert import convert
from prunekit.runs import jobs
from tests.distributed import configs
from tests.support import checkpoints, structured
from tests.support.checkpoints import same_bytes
from tests.support.exhaustion import ERRORS, Memory, exhausted_after
from tests.support.fault_table import record

pytestmark = pytest.mark.usefixtures("proof_in_process")

UNITS = """\
method = "obs"
pattern = ["neurons", "heads"]
sparsity = 0.5
compensate = "refit"
[train]
steps = 4
held_out = 2
batch = 2
every = 2
"""
ZEROS = ("load", "evaluate before", "survey", "prune", "block", "evaluate after", "verify")
SMALLER = ("load", "evaluate before", "rank heads", "refit", "train", "evaluate after", "verify")
LONG = {("units", phase) for phase in ("load", "evaluate before", "refit", "evaluate after")}
"""These take a second each, and end in code that others go through too."""
RUNS = [
    pytest.param(kind, phase, error, marks=[pytest.mark.soak] * ((kind, phase) in LONG))
    for kind, phases in (("weights", ZEROS), ("units", SMALLER))
    for phase, error in zip(phases, cycle(ERRORS), strict=False)
]
"""Kind of run, its phase, and the library that reports it."""


@pytest.fixture(scope="module", autouse=True)
def no_page():
    """Reports without their page, which takes longer than such a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunekit.reports.report.render", lambda report: "")
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exhausted") / "model"
    return checkpoints.write(folder, num_hidden_layers=2, num_key_value_heads=4)


def plan(model, output, kind):
    """Return the plan of a run that has each phase of its kind."""
    if kind == "units":
        return structured.planned(model, output, UNITS)
    prune = {"pattern": "unstructured", "sparsity": 0.5, "allocation": "owl"}
    return checkpoints.planned(
        model, output, prune=prune, evaluate={"data": str(model / "text.txt"), "windows": 2}
    )


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The outputs of runs with memory enough, by kind."""
    folder = tmp_path_factory.mktemp("whole")
    for kind in ("weights", "units"):
        list(jobs.run(plan(model, folder / kind, kind)))
    return folder


def carry_out(made, phase, memory):
    """Carry out a run whose memory is used up soon after a phase has begun."""
    memory.left = 3 if phase == "load" else None
    for each in jobs.run(made):
        if phase in {each.name, each.kind}:
            memory.left = 3


@pytest.mark.parametrize(("kind", "phase", "error"), RUNS)
def test_a_run_says_it_and_is_taken_up(model, whole, tmp_path, kind, phase, error):
    made, out = plan(model, tmp_path / "out", kind), tmp_path / "out"
    with Memory(error) as memory, pytest.raises(CapacityError) as raised:
        carry_out(made, phase, memory)
    assert str(raised.value).startswith("The memory is used up (")
    assert "run again with --resume" in str(raised.value)
    assert (out / "config.json").exists() == (phase in {"evaluate after", "verify"})
    *_, last = jobs.run(made, resume=True)
    assert last.kind == "finish"
    same_bytes(out, whole / kind)
    record("memory", f"run of {kind}: {phase} ({error})", "one error; --resume: same bytes")


@pytest.mark.parametrize(("operations", "error"), [(0, "Python"), (2, "CPU"), (40, "GPU")])
def test_a_conversion_leaves_nothing_and_is_repeated(whole, tmp_path, operations, error):
    out = tmp_path / "out"
    with exhausted_after(operations, error), pytest.raises(CapacityError, match="then try again"):
        convert(whole / "weights", out, "bitmask")
    assert not out.exists()
    convert(whole / "weights", out, "bitmask")
    assert [check.passed for check in verify(out)] == [True] * 4
    record("memory", f"conversion: operation {operations} ({error})", "one error; nothing is left")


def config(model, output):
    """Return the config of a run that needs no text."""
    tables = {
        "model": {"path": str(model), "device": "cpu"},
        "prune": {"method": "magnitude", "pattern": "2:4"},
        "output": {"path": str(output)},
    }
    return Config.model_validate(tables)


WORK = {
    "plan": lambda model, out: prunekit.plan(config(model, out.parent / "new")),
    "load": lambda model, out: prunekit.load(model),
    "inspect": lambda model, out: inspect(out),
    "verify": lambda model, out: verify(out),
    "evaluate": lambda model, out: perplexity.evaluate(
        str(model), [str(model / "text.txt")], 12, 2
    ),
}


@pytest.mark.parametrize("operations", [0, 5])
@pytest.mark.parametrize("work", WORK)
def test_other_work_says_it(model, whole, work, operations):
    with exhausted_after(operations, "CPU"), pytest.raises(CapacityError, match="then try again"):
        WORK[work](model, whole / "weights")
    record("memory", f"{work}", "one error")


def test_the_commands_end_with_exit_code_2(model, whole, tmp_path, capsys):
    with exhausted_after(0, "Python"):
        assert main(["inspect", str(whole / "weights")]) == 2
    assert capsys.readouterr().err.startswith("The memory is used up (Python could not allocate).")


LIMITED = """
import resource
from pathlib import Path
from prunekit.cli import main as cli

def pages():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

extra, *command = arguments
limit = pages() + (int(extra) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
code = cli.main(command)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model whose tensors are larger than all that a process has free by chance."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2}
    return checkpoints.write(tmp_path_factory.mktemp("large") / "m", **sizes)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["weights", "units", "convert", "evaluate"])
def test_a_process_that_may_not_have_more_memory_says_it(large, fork_server, tmp_path, kind):
    """The kernel refuses, at whatever place that is."""
    out = tmp_path / "out"
    command = {
        "weights": ["run", configs.write(tmp_path / "c.toml", large, out, evaluate=None)],
        "units": ["run", structured.write_config(large, out, structured.BOTH, evaluate=False)],
        "convert": ["convert", large, out, "--format", "dense"],
        "evaluate": ["evaluate", large, "--data", large / "text.txt", "--length", "12"],
    }[kind]
    world = fork_server.start(tmp_path / "said", 1, LIMITED, 12, *command)
    assert world.wait()[0] in {1, 2}, world.stderr(0)
    assert "The memory is used up (" in world.stderr(0)
    assert "Traceback" not in world.stderr(0)
    assert not (out / "config.json").exists()
    record("memory", f"{kind}: a limit of the process (RLIMIT_AS)", "one error, no traceback")
