"""Shards of a run that writes block by block: names, data types, the rest."""

from pathlib import Path

import pytest
import torch

from prunekit.checkpoint.output import OutputFolder
from prunekit.errors import NumericsError
from prunekit.models.sequential.weights import Weights
from prunekit.runs.block_shards import BlockShards, as_stored
from tests.support import checkpoints


@pytest.fixture
def made(tmp_path):
    """Shards of a model with a tensor that nothing uses, and their output folder."""
    folder = checkpoints.write(tmp_path / "m", dtype=torch.bfloat16)
    held = checkpoints.tensors(folder) | {"codes": torch.arange(3)}
    checkpoints.save(folder, held)

    def make(**model):
        plan = checkpoints.planned(folder, tmp_path / "out", model=model)
        output = OutputFolder(Path(plan.config.output.path), 3)
        output.begin("same", resume=False, overwrite=True)
        weights = Weights(plan.model, plan.checkpoint, plan.dtype, plan.device)
        return BlockShards(plan, [block.name for block in plan.blocks], weights, output), output

    return make, held


def test_the_rest_is_written_once_and_named_with_its_digest(made):
    make, held = made
    shards, output = make()
    shards.write_rest()
    first = output.shard_path(1)
    found = checkpoints.tensors(output.folder)
    assert found.keys() == {name for name in held if ".layers." not in name}
    assert all(torch.equal(value, held[name]) for name, value in found.items())
    assert [*output.journal["rest", ""]["files"]] == [first.name]
    first.unlink()
    shards.write_rest()
    assert not first.exists()
    output.close()


def test_weights_are_written_in_the_type_that_is_asked_for(made):
    make, held = made
    shards, output = make(dtype="float32")
    shards.write_rest()
    found = checkpoints.tensors(output.folder)
    assert found["model.norm.weight"].dtype == torch.float32
    assert torch.equal(found["codes"], held["codes"])
    output.close()


def test_a_broken_weight_is_refused(made, tmp_path):
    make, _ = made
    checkpoints.change(tmp_path / "m", "model.norm.weight", lambda weight: weight.fill_(torch.nan))
    shards, output = make()
    with pytest.raises(NumericsError, match=r"model\.norm\.weight"):
        shards.write_rest()
    output.close()


def test_a_value_as_it_is_stored():
    half = as_stored(torch.ones(3, 2).T, torch.float16)
    assert half.dtype == torch.float16
    assert half.is_contiguous()
    assert as_stored(torch.arange(3), torch.float16).dtype == torch.int64
