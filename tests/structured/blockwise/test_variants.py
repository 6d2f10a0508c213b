"""Variants of a model run from a block on, each under its own gates in all later blocks."""

from contextlib import nullcontext

import pytest
import torch

import prunekit
from prunekit.architectures import find_architecture
from prunekit.models.layout import stack_runners
from prunekit.structured.batches import mean_loss
from prunekit.structured.blockwise.block_passes import BlockPasses
from tests.support.units import randomized_model


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_gate_at_all_norms_holds_in_every_block_and_in_the_head(name):
    model = randomized_model(name)
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(2))
    batches = [{"input_ids": ids, "labels": ids[:, :6].contiguous() if name == "t5" else ids}]
    passes = BlockPasses(model, stack_runners(model, find_architecture(model)), None, batches)
    with prunekit.hidden(model) as gates, torch.no_grad():
        (gate,) = gates.gates.values()
        closed = gate.value.clone()
        closed[3] = 0
        (part,) = passes.whole()
        found = part.mean_losses([nullcontext(), gate.holding(closed), nullcontext()])
        assert gate.value.all()
        whole = mean_loss(model, batches)
        with gate.holding(closed):
            without = mean_loss(model, batches)
    assert found == pytest.approx([whole, without, whole], rel=1e-6)
    assert whole != pytest.approx(without, rel=1e-6)
