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
    for row, other in zip(one["training"]["history"], two["training"]["history"], strict=True):
        assert other["achieved"] == row["achieved"]
        for key in ("loss", "held_out"):
            assert (other[key] is None) == (row[key] is None)
            assert other[key] == (row[key] and pytest.approx(row[key], rel=1e-5))
    held, others = (tensors(folders[name, size]) for size in (1, 2))
    for key, value in held.items():
        assert ((value == 0) == (others[key] == 0)).all(), key
        assert others[key] == pytest.approx(value, abs=1e-4)
