"""One block in place of the model: its gradients are those of the model's loss."""

import pytest
import torch

from prunekit.architectures import find_architecture
from prunekit.errors import CheckpointError
from prunekit.models.layout import stack_runners
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.structured.batches import losses
from prunekit.structured.blockwise.block_forward import VARIANTS
from prunekit.structured.blockwise.block_passes import BlockPasses
from tests.support.units import randomized_model

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(2))


def blocks_of(model, batches):
    stacks = stack_runners(model, find_architecture(model))
    return BlockPasses(model, stacks, None, batches).backward()


def test_the_gradient_by_a_weight_is_that_of_the_model_however_often_it_is_asked_for():
    model, batch = randomized_model("gpt2"), {"input_ids": IDS}
    weights = [each.mlp.c_proj.weight for each in model.transformer.h]
    expected = torch.autograd.grad(losses(model, batch)[0].sum(), weights)
    for block in blocks_of(model, [batch]):
        weight = weights[block.inputs.index]
        for _ in range(2):
            (found,), predictions = block.gradients(batch, lambda weight=weight: [weight])
            torch.testing.assert_close(found, expected[block.inputs.index])
        assert predictions.tolist() == [8, 8]


def test_the_gradient_by_what_the_block_does_not_read_is_zero():
    model, batch = randomized_model("gpt2"), {"input_ids": IDS}
    other = model.transformer.h[0].mlp.c_proj.weight
    block = next(blocks_of(model, [batch]))
    assert block.inputs.index == len(model.transformer.h) - 1
    (found,), _ = block.gradients(batch, lambda: [other])
    assert not found.any()


def test_a_forward_runs_the_hooks_of_the_block_alone():
    model, batch = randomized_model("gpt2"), {"input_ids": IDS}
    seen = []
    for number, each in enumerate(model.transformer.h):
        each.mlp.register_forward_hook(lambda *_, number=number: seen.append(number))
    blocks = blocks_of(model, [batch])
    block = next(blocks)
    seen.clear()
    block.run(batch)
    assert seen == [block.inputs.index]


def test_more_variants_than_are_kept_at_once_are_measured_in_turn():
    model, batch = randomized_model("gpt2"), {"input_ids": IDS}
    block, entered = next(blocks_of(model, [batch])), []

    class Variant:
        def __enter__(self):
            entered.append(self)

        def __exit__(self, *_):
            return None

    variants = [Variant() for _ in range(VARIANTS + 1)]
    found = block.mean_losses(variants)
    assert list(dict.fromkeys(entered)) == variants
    assert len({*found}) == 1
    assert len(found) == VARIANTS + 1


@pytest.mark.parametrize("handed", ["keys", "further outputs"])
def test_a_block_that_hands_other_values_to_later_ones_is_refused(monkeypatch, handed):
    """Gradients flow through these too; those of T5's position bias do not."""
    model, batch = randomized_model("gpt2"), {"input_ids": IDS}
    call = StackRunner.bind

    def bind(self, index, hidden, context, block=None):
        run = call(self, index, hidden, context, block)

        def handing_on():
            if hidden.requires_grad and handed == "keys":
                context.shared["keys"] = {0: hidden}
            elif hidden.requires_grad:
                context.hand_on(index, (hidden * 2,))
            return run()

        return handing_on

    monkeypatch.setattr(StackRunner, "bind", bind)
    blocks = blocks_of(model, [batch])
    with pytest.raises(CheckpointError, match=f"also hands {handed} to later blocks"):
        next(blocks).gradients(batch, list)
