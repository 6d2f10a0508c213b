"""Several ranks prune like one: same masks, weights up to rounding."""

import json

import pytest
import torch

from prunekit.config.load import load_config
from prunekit.distributed.ranks import Ranks
from prunekit.runs.sparsify import planner
from tests.distributed import configs
from tests.distributed.configs import RUN
from tests.support import checkpoints
from tests.support.tiers import often

ROWS = {"pattern": "unstructured", "sparsity": 0.5, "scope": "row"}
LAYER = ROWS | {"scope": "layer"}
BLOCK = ROWS | {"scope": "block"}
CASES = {
    "magnitude global": {"method": "magnitude", **LAYER, "allocation": "global"},
    "magnitude tiles": {"method": "magnitude", "pattern": "block:4x4", "sparsity": 0.5},
    "magnitude block": {"method": "magnitude", **BLOCK},
    "random row": {"method": "random", "pattern": "row", "sparsity": 0.25},
    "wanda row, owl": {"method": "wanda", **ROWS, "allocation": "owl"},
    "wanda column": {"method": "wanda", "pattern": "column", "sparsity": 0.25},
    "wanda 4:8, refined": {"method": "wanda", "pattern": "4:8", "refine": "pcg"},
    "ria layer, steps": {"method": "ria", **LAYER, "steps": 2},
    "wanda, permuted": {"method": "wanda", "pattern": "2:4", "permute": True},
    "wanda, residual": {"method": "wanda", "pattern": "2:4", "permute": "residual"},
    "wanda, lowrank": {"method": "wanda", "pattern": "2:4", "recover": "lowrank"},
    "sparsegpt 2:4": {"method": "sparsegpt", "pattern": "2:4"},
    "sparsegpt block": {"method": "sparsegpt", **BLOCK, "propagation": "block"},
    "sparsegpt layer, in order": {"method": "sparsegpt", **LAYER, "order": "energy"},
    "admm 2:4": {"method": "admm", "pattern": "2:4"},
    "magnitude, blocks apart": {"method": "magnitude", "pattern": "2:4", "measure_error": False},
    "sparsegpt, blocks apart": {"method": "sparsegpt", "pattern": "2:4", "propagation": "none"},
    "alps layer": {"method": "alps", **LAYER, "most_iterations": 20},
}
FOUR = (
    "sparsegpt block",
    "wanda column",
    "magnitude tiles",
    "ria layer, steps",
    "sparsegpt, blocks apart",
)
"""Cases that four ranks share, who add up in another order."""
GPT2 = ("sparsegpt block",)
"""Cases of a model whose weights are stored inputs first."""
MIXTRAL = ("wanda column",)
"""Cases of a model with experts; to some ranks come few of their tokens."""
JUDGED = "sparsegpt 2:4"
"""The case whose perplexity is measured, too."""
TOLERANCE = 1e-4
"""How far weights may be off where sums are added up in another order, relative to their norm."""
SELDOM = ("magnitude block", "sparsegpt layer, in order")
SELDOM_FOUR = ("magnitude tiles", "sparsegpt, blocks apart")
"""Cases for the tier ``soak``, which share as another one does."""
OFTEN = [name for name in CASES if name not in SELDOM]
OFTEN_FOUR = [name for name in FOUR if name not in SELDOM_FOUR]
WORLDS = [(1, OFTEN), (1, SELDOM), (2, OFTEN), (2, SELDOM), (4, OFTEN_FOUR), (4, SELDOM_FOUR)]
"""Ranks and cases of worlds, each of which is started for the first test that needs it."""


class Outputs(dict):
    """The folder of each run, by model, case and number of ranks."""

    def __init__(self, fork_server, root):
        super().__init__()
        self.fork_server, self.root = fork_server, root
        self.models = {
            "llama": checkpoints.write(root / "llama", num_hidden_layers=2),
            "gpt2": checkpoints.write(root / "gpt2", "gpt2"),
            "mixtral": checkpoints.write(root / "mixtral", "mixtral"),
        }

    def __missing__(self, key):
        _, case, size = key
        (names,) = (cases for ranks, cases in WORLDS if ranks == size and case in cases)
        wanted = [("llama", name) for name in names]
        wanted += [("gpt2", name) for name in GPT2 if name in names]
        wanted += [("mixtral", name) for name in MIXTRAL if name in names]
        world, files = self.root / f"{size}-{len(self)}", []
        for number, (model, name) in enumerate(wanted):
            folder = self[model, name, size] = world.with_name(f"{world.name}-{number}")
            file = folder.with_suffix(".toml")
            sections = {"prune": CASES[name]} | ({} if name == JUDGED else {"evaluate": None})
            files.append(configs.write(file, self.models[model], folder, **sections))
        self.fork_server.start(world, size, RUN, *files).succeed()
        return self[key]


@pytest.fixture(scope="module")
def outputs(fork_server, tmp_path_factory):
    return Outputs(fork_server, tmp_path_factory.mktemp("sharing"))


def compare(one, several, tolerance):
    """Assert equal masks, close weights and equal measurements."""
    report, other = (json.loads((folder / "report.json").read_text()) for folder in (one, several))
    mine, theirs = checkpoints.tensors(one), checkpoints.tensors(several)
    assert mine.keys() == theirs.keys()
    for layer, found in zip(report["layers"], other["layers"], strict=True):
        a, b = mine[layer["tensor"]], theirs[layer["tensor"]]
        assert torch.equal(a == 0, b == 0), layer["name"]
        assert float((a - b).norm()) <= tolerance * float(a.norm()), layer["name"]
        assert layer["sparsity"] == found["sparsity"]
        if layer["relative_error"] is not None:
            assert found["relative_error"] == pytest.approx(layer["relative_error"], rel=1e-3)
    for before, after in zip(report["evaluation"], other["evaluation"], strict=True):
        assert after["before"] == pytest.approx(before["before"], rel=1e-6)
        assert after["after"] == pytest.approx(before["after"], rel=1e-6)
        assert after["protocol"] == before["protocol"]
    assert other["sparsity"] == report["sparsity"]


@pytest.mark.parametrize("name", often(CASES, OFTEN))
def test_two_ranks_give_the_bits_of_one(outputs, name):
    compare(outputs["llama", name, 1], outputs["llama", name, 2], 0)


@pytest.mark.parametrize("name", often(FOUR, OFTEN_FOUR))
def test_four_ranks_give_the_masks_of_one(outputs, name):
    compare(outputs["llama", name, 1], outputs["llama", name, 4], TOLERANCE)


@pytest.mark.parametrize(("size", "tolerance"), [(2, 0), (4, TOLERANCE)])
@pytest.mark.parametrize("name", GPT2)
def test_weights_that_are_stored_inputs_first_are_shared_too(outputs, name, size, tolerance):
    compare(outputs["gpt2", name, 1], outputs["gpt2", name, size], tolerance)


@pytest.mark.parametrize(("size", "tolerance"), [(2, TOLERANCE), (4, TOLERANCE)])
@pytest.mark.parametrize("name", MIXTRAL)
def test_experts_are_shared_too(outputs, name, size, tolerance):
    compare(outputs["mixtral", name, 1], outputs["mixtral", name, size], tolerance)


def test_blocks_that_are_pruned_apart_go_round_whole(outputs):
    def sent(name):
        report = json.loads((outputs["llama", name, 2] / "report.json").read_text())
        return [set(rank["sent_bytes"]) for rank in report["ranks"]]

    assert sent("magnitude, blocks apart") == [set(), set()]
    assert sent("sparsegpt, blocks apart") == [{"statistics"}, {"statistics"}]


@pytest.mark.parametrize(
    "name", ["sparsegpt 2:4", "sparsegpt, blocks apart", "wanda column", "admm 2:4", "alps layer"]
)
def test_the_traffic_of_a_rank_is_what_the_plan_says(outputs, name):
    folder = outputs["llama", name, 2]
    planned = planner.plan(load_config(folder.with_suffix(".toml")), Ranks(0, 2)).traffic
    for rank in json.loads((folder / "report.json").read_text())["ranks"]:
        sent = {what: rank["sent_bytes"].get(what, 0) for what in planned}
        assert sent == planned
        assert rank["sent_bytes"].keys() - planned.keys() <= {"thresholds", "errors", "scores"}


def test_the_traffic_that_is_planned_is_the_formula(outputs):
    """That of the README, for two ranks."""
    config = load_config(outputs["llama", JUDGED, 2].with_suffix(".toml"))
    made = planner.plan(config, Ranks(0, 2))
    # One Gram matrix a stage, of which all of these have less than a panel of rows.
    inputs = [stage[0].inputs for block in made.blocks for stage in block.stages]
    grams = sum(4 * width * width for width in inputs)
    weights = sum(4 * linear.size for linear in made.linears)
    assert made.traffic == {"statistics": grams, "inverses": grams // 2, "rows": weights // 2}


FACTORS = """
import prunekit_kernels
from prunekit.distributed import ranks
real, broadcast, events = prunekit_kernels.inverse_factor, ranks.Ranks.broadcast, []
def inverse_factor(gram, damping):
    events.append(len(gram))
    return real(gram, damping)
def handed(*arguments):
    events.append("round")
    broadcast(*arguments)
prunekit_kernels.inverse_factor, ranks.Ranks.broadcast = inverse_factor, handed
"""


@pytest.mark.parametrize("propagation", ["block", "stage"])
def test_each_factor_is_computed_by_one_rank(fork_server, tmp_path, propagation):
    model = checkpoints.write(tmp_path / "m", num_hidden_layers=2)
    prune = {"method": "sparsegpt", "pattern": "2:4", "propagation": propagation}
    file = configs.write(tmp_path / "c.toml", model, tmp_path / "out", evaluate=None, prune=prune)
    world = fork_server.start(tmp_path / "said", 2, FACTORS + RUN + "print(*events)", file)
    world.succeed()
    said = [(world.folder / f"{rank}.out").read_text().split() for rank in range(2)]
    # Four Gram matrices a block, the last one twice as wide and eight times the work.
    made = [[event for event in events if event != "round"] for events in said]
    assert sorted(made[0] + made[1]) == ["32"] * 6 + ["64"] * 2
    assert made[0].count("64") == made[1].count("64") == 1
    if propagation == "block":  # those of a block at once; the largest is one rank's share
        wide, narrow, four = ["64"], ["32"] * 3, ["round"] * 4
        assert said == [[*wide, *four, *narrow, *four], [*narrow, *four, *wide, *four]]


INVERSES = FACTORS.replace("inverse_factor", "damped_inverse").replace(
    "(gram, damping)", "(gram, *others)"
)


def test_inverses_are_made_one_on_each_rank_at_a_time(fork_server, tmp_path):
    model = checkpoints.write(tmp_path / "m", num_hidden_layers=1)
    prune = {"method": "admm", "pattern": "2:4"}
    file = configs.write(tmp_path / "c.toml", model, tmp_path / "out", evaluate=None, prune=prune)
    world = fork_server.start(tmp_path / "said", 2, INVERSES + RUN + "print(*events)", file)
    world.succeed()
    said = [(world.folder / f"{rank}.out").read_text() for rank in range(2)]
    # Seven for each of four Gram matrices: who makes four of the first makes three of the second.
    four, three = "32 round round " * 3 + "32 round ", "32 round round " * 3 + "round "
    last = [each.replace("32", "64").strip() for each in (three, four)]
    assert said[0].strip() == four + three + four + last[0]
    assert said[1].strip() == three + four + three + last[1]


def test_inverses_that_are_foreseen_are_made_by_ranks_in_turn(fork_server, tmp_path):
    model = checkpoints.write(tmp_path / "m", num_hidden_layers=1)
    prune = CASES["alps layer"]
    file = configs.write(tmp_path / "c.toml", model, tmp_path / "out", evaluate=None, prune=prune)
    world = fork_server.start(tmp_path / "said", 2, INVERSES + RUN + "print(*events)", file)
    world.succeed()
    said = [(world.folder / f"{rank}.out").read_text().split() for rank in range(2)]
    made = [len(events) - events.count("round") for events in said]
    # Seven for each of seven linears. At most two changes of pace were not foreseen by half.
    assert [events.count("round") for events in said] == [49, 49]
    assert max(made) - min(made) <= 1
    assert 49 <= sum(made) <= 49 + 7 * 2


BROKEN = """
import prunekit_kernels
def fail(*arguments):
    if rank == 1:
        raise ArithmeticError("not positive definite.")
    return real(*arguments)
"""


@pytest.mark.parametrize(
    ("method", "name"), [("sparsegpt", "inverse_factor"), ("admm", "damped_inverse")]
)
def test_what_one_rank_cannot_invert_all_refuse(fork_server, tmp_path, method, name):
    model = checkpoints.write(tmp_path / "m", num_hidden_layers=1)
    prune = {"method": method, "pattern": "2:4"}
    file = configs.write(tmp_path / "c.toml", model, tmp_path / "out", evaluate=None, prune=prune)
    broken = f"{BROKEN}real = prunekit_kernels.{name}\nprunekit_kernels.{name} = fail\n"
    world = fork_server.start(tmp_path / "said", 2, broken + RUN, file)
    assert world.wait() == [99, 99]
    for rank in range(2):
        assert "proj: not positive definite. Use more calibration" in world.stderr(rank)


UNLIKE = """
from prunekit.models import devices
devices._multiplies_bfloat16 = lambda: rank == 0 and bool(%d)
"""


def test_ranks_on_unlike_cpus_run_in_the_type_that_all_have(fork_server, tmp_path):
    model = checkpoints.write(tmp_path / "m", dtype=torch.bfloat16, num_hidden_layers=1)
    for size in (1, 2):
        file = tmp_path / f"{size}.toml"
        configs.write(file, model, tmp_path / f"out{size}", evaluate=None)
        fork_server.start(tmp_path / f"said{size}", size, UNLIKE % (size > 1) + RUN, file).succeed()
    one, two = (tmp_path / f"out{size}" for size in (1, 2))
    compare(one, two, 0)
    assert json.loads((two / "report.json").read_text())["model"]["compute_dtype"] == "float32"


EVALUATE = """
from prunekit.cli import main as cli
code = cli.main(["evaluate", *arguments, "--length", "12", "--windows", "5"])
"""


def test_perplexity_is_measured_by_all_and_said_by_one(fork_server, tmp_path):
    model = checkpoints.write(tmp_path / "m", num_hidden_layers=1)
    said = []
    for size in (1, 2):
        arguments = (model, "--data", model / "text.txt")
        world = fork_server.start(tmp_path / str(size), size, EVALUATE, *arguments)
        world.succeed()
        said.append((world.folder / "0.out").read_text())
    assert said[0] == said[1] != ""
    assert (world.folder / "1.out").read_text() == ""
