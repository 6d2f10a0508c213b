"""Several ranks remove the units that one does, each on its samples."""

import json

import pytest

from tests.distributed import configs
from tests.distributed.configs import RUN
from tests.support import checkpoints

HEADS = {"pattern": "heads", "sparsity": 0.5}
NEURONS = {"pattern": "neurons", "sparsity": 0.25}
CASES = {
    "entropy": {"method": "entropy", **HEADS},
    "gradient, refitted": {"method": "gradient", **HEADS, "compensate": "refit"},
    "leave-one-out": {"method": "leave-one-out", **HEADS},
    "surgeon, both": {"method": "surgeon", "pattern": ["heads", "neurons"], "sparsity": 0.5},
    "obs, judged": {"method": "obs", **HEADS, "truth": True},
    # Windows of two samples and a half: some are of one rank, some of two.
    "salience": {"method": "salience", "window": 60, **NEURONS},
    "salience of coordinates": {
        "method": "salience", "window": 60, "pattern": "hidden", "sparsity": 0.5,
    },
    "flap": {"method": "flap", **NEURONS},
    "output-norm": {"method": "output-norm", **NEURONS},
    "llm-pruner": {"method": "llm-pruner", **NEURONS},
    "hybrid": {"method": "hybrid", **NEURONS},
    "gradient of coordinates": {"method": "gradient", "pattern": "hidden", "sparsity": 0.5},
    "flap, bias": {"method": "flap", **NEURONS, "compensate": "bias"},
    "block-influence": {"method": "block-influence", "pattern": "blocks", "sparsity": 0.5},
}  # fmt: skip
THREE = ("salience", "salience of coordinates")
"""Cases that three ranks, of 3, 3 and 2 samples, also run."""
BIASED = "flap, bias"
"""The case of a model whose linears have a bias."""
TRAINED = "leave-one-out"
TRAIN = {"steps": 3, "batch": 2, "held_out": 2}


@pytest.fixture(scope="module")
def reports(fork_server, tmp_path_factory):
    """The report of each run, by case and number of ranks."""
    root = tmp_path_factory.mktemp("units")
    llama = checkpoints.write(root / "llama", num_hidden_layers=2)
    gpt2 = checkpoints.write(root / "gpt2", "gpt2")
    found = {}
    for size in (1, 2, 3):
        files = []
        chosen = {name: CASES[name] for name in (CASES if size < 3 else THREE)}
        for number, (name, prune) in enumerate(chosen.items()):
            file, folder = root / f"{size}-{number}.toml", root / f"{size}-{number}"
            model = gpt2 if name == BIASED else llama
            more = {"train": TRAIN} if name == TRAINED else {}
            files.append(configs.write(file, model, folder, prune=prune, **more))
        fork_server.start(root / f"world{size}", size, RUN, *files).succeed()
        for number, name in enumerate(chosen):
            found[name, size] = json.loads((root / f"{size}-{number}" / "report.json").read_text())
    return found


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 2) for name in CASES), *((name, 3) for name in THREE)]
)
def test_several_ranks_take_out_what_one_does(reports, name, size):
    one, two = reports[name, 1], reports[name, size]
    for layer, other in zip(one["layers"], two["layers"], strict=True):
        assert layer["kept"] == other["kept"], layer["name"]
        assert layer["scores"] == pytest.approx(other["scores"], rel=1e-3, abs=1e-9)
        if layer["entropy"]:
            assert layer["entropy"] == pytest.approx(other["entropy"], rel=1e-4)
    assert one["agreement"] == two["agreement"]
    assert (one["training"] is None) == (name != TRAINED)
    if name == TRAINED:
        for key in ("base", "post", "final"):
            assert two["training"][key] == pytest.approx(one["training"][key], rel=1e-5)
    assert bool(one["agreement"]) == CASES[name].get("truth", False)
    for before, after in zip(one["evaluation"], two["evaluation"], strict=True):
        assert after["after"] == pytest.approx(before["after"], rel=1e-4)
    assert any(len(layer["kept"]) < layer["units"] for layer in one["layers"])
