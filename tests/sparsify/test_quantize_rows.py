"""Rows that are rounded: what is counted, and models in memory whose zeros stay."""

from dataclasses import replace

import pytest
import torch

from prunekit.methods.quantize import Quantization
from prunekit.sparsify.in_memory import ModelPruner, prune_table
from prunekit.sparsify.recipe import Recipe
from prunekit.statistics import Gram
from prunekit.structured.block_batches import block_batches
from tests.support.architectures import tiny

HALF = {"pattern": "unstructured", "sparsity": 0.5}
INT4 = Quantization("int4", None, compensates=True)


def pruned(ids, how, **settings):
    """Return a model in memory, pruned and rounded, and its records."""
    model = tiny("llama")
    table = prune_table({"method": "sparsegpt", "pattern": "2:4"} | settings)
    recipe = replace(Recipe.of(table, calibrated=True), quantize=how)
    made = ModelPruner.of(model, block_batches(ids, model), table, recipe)
    found = [*made.prune(made.allocate(table.sparsity))]
    return model, recipe, found


@pytest.mark.parametrize("settings", [{}, {**HALF, "steps": 2, "schedule": "linear"}], ids=str)
def test_zeros_and_errors_are_counted(ids, settings):
    model, recipe, found = pruned(ids, INT4, **settings)
    assert Gram in recipe.needs
    for result in found:
        record = result.as_record()
        weight = model.get_parameter(f"{record['name']}.weight")
        assert record["refilled"] == 0
        assert record["zeros_pruned"] == weight.numel() // 2 <= int((weight == 0).sum())
        assert record["pruned_error"] > 0
        assert result.scale.shape == (len(weight), 1)
        codes = weight / result.scale
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert codes.abs().max() <= 8.001


def test_without_a_grid_nothing_is_said_of_it(ids):
    *_, found = pruned(ids, None)
    assert all("refilled" not in result.as_record() for result in found)
    assert all(result.scale is None for result in found)


def test_nearest_needs_no_statistics():
    nearest = replace(INT4, compensates=False)
    table = prune_table({"method": "magnitude", "pattern": "2:4", "measure_error": False})
    assert replace(Recipe.of(table, calibrated=True), quantize=nearest).needs == ()
