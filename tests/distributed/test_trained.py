"""Several ranks train a model and prune it meanwhile as one rank does."""

import json

import pytest

from tests.distributed import configs
from tests.distributed.configs import RUN
from tests.support import checkpoints
from tests.support.checkpoints import tensors

TRAIN = {"steps": 6, "batch": 4, "held_out": 2, "every": 3, "rate": 1e-3}
GRADUAL = {"sparsity": 0.5, "end": 4, "every": 2}
CASES = {
    "once": {"method": "wanda", "pattern": "2:4"},
    "weights": {"method": "magnitude", "pattern": "unstructured", "scope": "layer", **GRADUAL},
    "units": {"method": "gradient", "pattern": ["heads", "neurons"], **GRADUAL},
}


@pytest.fixture(scope="module")
def folders(fork_server, tmp_path_factory):
    """Output folder of each run, by case and number of ranks."""
    root = tmp_path_factory.mktemp("trained")
    model = checkpoints.write(root / "llama")
    found = {}
    for size in (1, 2):
        files = []
        for name, prune in CASES.items():
            found[name, size] = root / f"{size}-{name}"
            file = root / f"{size}-{name}.toml"
            files.append(configs.write(file, model, found[name, size], prune=prune, train=TRAIN))
        fork_server.start(root / f"world{size}", size, RUN, *files).succeed()
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_write_the_zeros_and_units_of_one(folders, name):
    one, two = (json.loads((folders[name, size] / "report.json").read_text()) for size in (1, 2))
    assert two["sparsity"] == one["sparsity"]
    for layer, same in zip(one["layers"], two["layers"], strict=True):
        assert same.get("score_statistics") == layer.get("score_statistics")
        assert ("score_statistics" in layer) == (name != "weights")
    for row, other in zip(one["training"]["history"], two["training"]["history"], strict=True):
        assert other["achieved"] == row["achieved"]
        for key in ("loss", "held_out"):
            assert (other[key] is None) == (row[key] is None)
            assert other[key] == (row[key] and pytest.approx(row[key], rel=1e-5))
    held, others = (tensors(folders[name, size]) for size in (1, 2))
    for key, value in held.items():
        assert ((value == 0) == (others[key] == 0)).all(), key
        assert others[key] == pytest.approx(value, abs=1e-4)


RESUMED = """
from prunekit.config.load import load_config
from prunekit.distributed.join import join
from prunekit.errors import StoppedError
from prunekit.runs import jobs

with join("cpu") as ranks:
    made, reached = jobs.plan(load_config(arguments[0]), ranks), []
    try:
        for record in jobs.run(made, stop=lambda: bool(reached)):
            if record.values.get("done") == 3:
                reached.append(record)
        raise AssertionError("not stopped")
    except StoppedError:
        pass
    names = [record.name for record in jobs.run(made, resume=True)]
    assert "continues after step 2" in names, names
"""


def test_two_ranks_go_on_with_a_stopped_training(fork_server, folders, tmp_path):
    model = folders["units", 2].parent / "llama"
    train = TRAIN | {"save_every": 2}
    file = tmp_path / "out.toml"
    configs.write(file, model, tmp_path / "out", prune=CASES["units"], train=train)
    fork_server.start(tmp_path / "world", 2, RESUMED, file).succeed()
    checkpoints.same_bytes(tmp_path / "out", folders["units", 2])
