"""A smaller model without weights runs block by block as the one that was cut in memory."""

from dataclasses import replace

import pytest
import torch

from prunekit.architectures import find_architecture
from prunekit.errors import ConfigError
from prunekit.models.layout import stack_runners
from prunekit.models.load import load
from prunekit.models.sequential.pipeline import iterate_blocks
from prunekit.models.sequential.weights import Weights
from prunekit.models.units.removal import count_parameters
from prunekit.runs.structured.smaller_model import SmallerModel
from tests.support import checkpoints
from tests.support.removals import BATCHES, equal_units, removed_in_memory, unit_plan

ALL = ["blocks", "hidden", "heads", "neurons"]


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [("llama", ALL), ("gemma2", ["blocks", "hidden"]), ("bert", ["blocks"])],
)
def test_its_blocks_return_what_those_in_memory_do(model_type, kinds, tmp_path):
    """So units can be ranked after those of other kinds are removed."""
    folder = checkpoints.write(tmp_path / "m", model_type)
    plan = unit_plan(folder, tmp_path / "out", kinds)
    removals = removed_in_memory(plan, equal_units, tmp_path / "whole")
    smaller, whole = SmallerModel(plan, removals), load(tmp_path / "whole", plan.dtype)
    weights = Weights(smaller.model, smaller.checkpoint, plan.dtype, plan.device)
    mine = iterate_blocks(smaller.model, smaller.stacks, weights, BATCHES)
    theirs = iterate_blocks(whole, stack_runners(whole, find_architecture(whole)), None, BATCHES)
    for ours, expected in zip(mine, theirs, strict=True):
        assert ours.name == expected.name
        assert all(map(torch.equal, ours.hidden, expected.hidden))
    assert count_parameters(SmallerModel(plan, removals).model) == count_parameters(whole)


def test_changed_values_are_read_unrounded(tmp_path):
    folder = checkpoints.write(tmp_path / "m", dtype=torch.bfloat16)
    plan = unit_plan(folder, tmp_path / "out", ["hidden"])
    name = "model.norm.weight"
    kept = {"model.embed_tokens": [*range(20)]}
    checkpoint = SmallerModel(plan, [("hidden", kept)]).checkpoint
    value = checkpoint.read([name])[name]
    assert checkpoint.entries[name].dtype == torch.bfloat16
    assert checkpoint.entries[name].shape == (20,)
    assert torch.equal(value, torch.full((20,), (32 / 20) ** 0.5))
    rounded = SmallerModel(replace(plan, dtype=torch.bfloat16), [("hidden", kept)])
    assert torch.equal(rounded.checkpoint.read([name])[name], value.bfloat16())


def test_parts_without_heads_and_neurons_and_back(tmp_path):
    folder = checkpoints.write(tmp_path / "m", "gpt2")
    plan = unit_plan(folder, tmp_path / "out", ["heads", "neurons"], uniform=False)
    heads = {f"transformer.h.{number}.attn": [1, 3] for number in range(2)}
    neurons = {f"transformer.h.{number}.mlp.c_proj": [] for number in range(2)}
    neurons["transformer.h.1.mlp.c_proj"] = [5]
    smaller = SmallerModel(plan, [("heads", heads), ("neurons", neurons)])
    name, whole = "transformer.h.0.attn.c_proj.weight", torch.rand(32, 32)
    columns = [*range(8, 16), *range(24, 32)]
    part = smaller.cut(name, whole)
    assert part is not None
    assert torch.equal(part, whole[columns])
    back = torch.zeros_like(whole)
    back[columns] = part
    assert torch.equal(smaller.put_back(name, part), back)
    assert smaller.cut("transformer.h.0.mlp.c_proj.weight", whole) is None
    assert smaller.cut("transformer.h.0.mlp.c_proj.bias", whole[0]) is not None
    assert len(smaller.notes) == 2


def test_units_that_no_layer_is_left_with_are_refused(tmp_path):
    folder = checkpoints.write(tmp_path / "m")
    plan = unit_plan(folder, tmp_path / "out", ["neurons"])
    kept = {f"model.layers.{number}.mlp.down_proj": [] for number in range(2)}
    with pytest.raises(ConfigError, match="all of its 64 neurons are pruned"):
        SmallerModel(plan, [("neurons", kept)])
