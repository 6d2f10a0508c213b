"""Shards: restored blocks have the same weights, and the rest is unchanged."""

import pytest
import torch

from prunekit.models.sequential.pipeline import load_blocks
from prunekit.runs.sparsify.run import SparsifyRun, run
from prunekit.runs.sparsify.shards import compressed_layouts
from tests.support import checkpoints
from tests.support.checkpoints import planned, tensors


@pytest.fixture(scope="module", params=["dense", "2:4"])
def finished(request, tmp_path_factory):
    """Return the plan, output folder and report of a finished run."""
    folder = tmp_path_factory.mktemp("shards")
    model = checkpoints.write(folder / "m")
    prune = {"method": "wanda", "pattern": "2:4"}
    plan = planned(model, folder / "out", prune=prune, output={"format": request.param})
    return plan, folder / "out", [*run(plan)][-1].values


def test_a_written_block_is_restored_to_the_same_weights(finished):
    plan, folder, report = finished
    again = SparsifyRun(plan)
    layers = [layer for layer in report["layers"] if layer["block"] == 1]
    (loaded,) = load_blocks(plan.stacks, again.weights, {1})
    again.shards.restore_block(loaded, 1, layers)
    assert layers
    for layer in layers:
        weight = loaded.module.get_submodule(layer["name"].removeprefix(f"{loaded.name}.")).weight
        assert float((weight == 0).float().mean()) == layer["sparsity"] == 0.5
        if "stored" not in layer:
            assert torch.equal(weight, tensors(folder)[layer["tensor"]])


def test_layouts_are_of_the_layers_that_are_compressed(finished):
    plan, _, report = finished
    layouts = compressed_layouts(report["layers"])
    compressed = plan.config.output.format != "dense"
    assert len(layouts) == compressed * len(report["layers"])
    assert all(f"{name}.weight" in plan.checkpoint.entries for name in layouts)


def test_the_first_shard_holds_what_is_outside_blocks(finished):
    plan, folder, _ = finished
    outside = {name for name in plan.checkpoint.entries if ".layers." not in name}
    (first,) = folder.glob("model-00001-of-*.safetensors")
    from safetensors.torch import load_file

    written, source = load_file(first), plan.checkpoint.read(outside)
    assert written.keys() == outside
    assert all(torch.equal(value, source[name]) for name, value in written.items())
