"""Families that are found by a traced forward, pruned and opened by stock transformers.

Masks are computed anew from the products of the stock model, so a linear that is missed, or whose
input is another than in the model, shows.
"""

import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from prunekit.models.stock import open_model
from prunekit.runs.sparsify import run
from tests.support import checkpoints
from tests.support.architectures import WITHOUT_GATE
from tests.support.checkpoints import planned
from tests.support.multiplied import wanda_mistakes
from tests.support.tiers import often

FAMILIES: dict[str, dict[str, Any]] = {
    "ctrl": {},
    "deepseek_v3": {},
    "gemma4_text": {},
    "gpt_oss": {},
    "granitemoe": {},
    "jamba": {},
    "llava": {"head": AutoModelForImageTextToText},
    "mamba": {},
    "nemotron_h": WITHOUT_GATE,
    "phimoe": {},
    "qwen2_moe": {},
}
OFTEN = ("deepseek_v3", "gemma4_text", "gpt_oss", "llava", "mamba", "nemotron_h")
"""Types that differ in how blocks are found, or their experts laid out."""


@pytest.fixture
def samples(monkeypatch):
    """Calibration tokens of the last run, in batches."""
    found, iterate = [], run.iterate_blocks

    def noted(model, stacks, weights, inputs, *args, **options):
        found[:] = [each["input_ids"] for each in inputs]
        return iterate(model, stacks, weights, inputs, *args, **options)

    monkeypatch.setattr(run, "iterate_blocks", noted)
    return found


@pytest.mark.parametrize("model_type", often(FAMILIES, OFTEN))
def test_every_matrix_of_the_blocks_is_pruned_exactly_or_named(model_type, tmp_path, samples):
    folder = checkpoints.write(tmp_path / "m", model_type, **FAMILIES[model_type])
    prune = {"method": "wanda", "pattern": "unstructured", "sparsity": 0.5, "starved_below": 1}
    plan = planned(folder, tmp_path / "out", prune=prune | {"propagation": "block"})
    list(run.run(plan))
    eager = {"dtype": torch.float32, "experts_implementation": "eager"}
    pruned, dense = (open_model(each, **eager) for each in (tmp_path / "out", folder))
    notes = " ".join(plan.notes)
    for block in plan.blocks:
        for path, weight in pruned.get_submodule(block.name).named_parameters():
            if weight.ndim > 1 and min(weight.shape[-2:]) > 1 and not path.endswith("_bias"):
                name = re.sub(r"\d+$", "*", block.name) + f".{path}"
                named = name in notes or f"{block.name}.{path.removesuffix('.weight')}" in notes
                assert ((weight == 0).double().mean() == 0.5) != named, name
    names = [block.name for block in plan.blocks]
    assert wanda_mistakes(dense, pruned, names, torch.cat(samples)) == []
