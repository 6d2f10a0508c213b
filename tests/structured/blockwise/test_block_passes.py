"""A passes holds one block of weights, and its losses and gradients are the model's."""

from contextlib import nullcontext

import pytest
import torch

from prunekit.architectures import find_architecture
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import CheckpointError
from prunekit.models.empty_model import empty_model
from prunekit.models.layout import stack_runners
from prunekit.models.sequential.hidden_states import MmapStates
from prunekit.models.sequential.weights import Weights
from prunekit.structured.batches import losses, mean_loss
from prunekit.structured.blockwise import block_passes
from prunekit.structured.blockwise.block_forward import BlockForward
from prunekit.structured.blockwise.block_passes import BlockPasses
from tests.support.units import randomized_model

CPU = torch.device("cpu")
IDS = torch.randint(3, 96, (3, 10), generator=torch.Generator().manual_seed(1))


def passes_in_memory(model, batches, **options):
    return BlockPasses(
        model, stack_runners(model, find_architecture(model)), None, batches, **options
    )


def test_one_block_is_loaded_at_a_time_and_each_twice(tmp_path):
    randomized_model("llama", num_hidden_layers=3).save_pretrained(tmp_path)
    model = empty_model(open_checkpoint(tmp_path))
    read = []
    weights = Weights(model, open_checkpoint(tmp_path), torch.float32, CPU)
    load = weights.load
    weights.load = lambda module, **options: (read.append(module), load(module, **options))[1]
    passes = BlockPasses(
        model, stack_runners(model, find_architecture(model)), weights, [{"input_ids": IDS}]
    )
    order = []
    for block in passes.backward():
        order.append(block.inputs.index)
        loaded = [
            number
            for number, each in enumerate(model.model.layers)
            if not any(parameter.is_meta for parameter in each.parameters())
        ]
        assert loaded == [block.inputs.index]
    assert order == [2, 1, 0]
    assert [read.count(each) for each in model.model.layers] == [2, 2, 2]


def test_gradients_reach_every_block_though_no_ranker_asks_for_them(tmp_path):
    """Hidden states may lie on disk, and logits are computed in parts."""
    model = randomized_model("llama", num_hidden_layers=3)
    batches = [{"input_ids": part} for part in IDS.split(2)]
    inputs = [[] for _ in model.model.layers]
    hooks = [
        each.register_forward_pre_hook(lambda _, x, at=at: inputs[at].append(x[0]))
        for at, each in enumerate(model.model.layers)
    ]
    total = sum(losses(model, batch)[0].sum() for batch in batches)
    for hook in hooks:
        hook.remove()
    expected = torch.autograd.grad(total, [each for at in inputs[1:] for each in at])
    passes = passes_in_memory(model, batches, new_hidden_states=lambda: MmapStates(CPU, tmp_path))
    found = []
    for block in passes.backward():
        found = [*block.loss.by_output, *found]
    for gradient, other in zip(found, expected, strict=False):
        torch.testing.assert_close(gradient, other)


def test_logits_are_computed_for_some_positions_at_a_time(monkeypatch):
    model = randomized_model("llama")
    passes = passes_in_memory(model, [{"input_ids": IDS}])
    whole, parts = [], []
    for size, found in ((100, whole), (4, parts)):
        monkeypatch.setattr(block_passes, "HEAD_TOKENS", size)
        block = next(passes.backward())
        found.append((block.loss.by_output[0].clone(), block.loss.predictions[0]))
    torch.testing.assert_close(parts[0], whole[0])


@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_the_loss_after_any_block_is_that_of_the_model(model_type):
    model = randomized_model(model_type)
    batches = [{"input_ids": part} for part in IDS.split(2)]
    if model_type == "t5":
        batches = [each | {"labels": each["input_ids"][:, :6].clone()} for each in batches]
    passes, expected = passes_in_memory(model, batches), mean_loss(model, batches)
    for block in passes.backward():
        found = block.mean_losses([nullcontext(), nullcontext()])
        assert found == pytest.approx([expected] * 2, rel=1e-6)


def test_an_encoder_that_is_not_read_directly_is_refused(monkeypatch):
    model = randomized_model("t5")
    passes = passes_in_memory(model, [{"input_ids": IDS, "labels": IDS}])
    keep = BlockForward._keep
    monkeypatch.setattr(
        BlockForward,
        "_keep",
        lambda self, number, found: keep(self, number, [found[0], None][: len(found)]),
    )
    with pytest.raises(CheckpointError, match="changes the output of its encoder"):
        [*passes.backward()]
