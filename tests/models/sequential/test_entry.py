"""Inputs of the first blocks, of text and of images."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from prunekit.architectures import find_architecture
from prunekit.architectures.towers import probe_towers
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.data.images import ImageReader
from prunekit.models import stock
from prunekit.models.empty_model import empty_model
from prunekit.models.layout import stack_runners
from prunekit.models.processors import read_processor
from prunekit.models.sequential.entry import is_image
from prunekit.models.sequential.pipeline import iterate_blocks
from prunekit.models.sequential.weights import Weights
from tests.support.vision import write_vision

CPU = torch.device("cpu")


def test_a_batch_has_images_if_it_has_pixels():
    ids = torch.ones(1, 2)
    assert is_image({"input_ids": ids, "pixel_values": ids})
    assert not is_image({"input_ids": ids, "attention_mask": ids, "mm_token_type_ids": ids})


def first_input(model, inputs):
    """Return the input of the first block of the text."""
    seen = []
    block = model.model.language_model.layers[0]
    hook = block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(("model_type", "more"), [("llava", 0), ("qwen3_vl", 1)])
def test_the_tower_runs_once_a_row(tmp_path, model_type, more):
    """Once more where it is checked that features are only added between blocks."""
    folder = write_vision(tmp_path, model_type)
    inputs = ImageReader(read_processor(folder), 96, 1000).example()
    model = stock.open_model(folder, dtype=torch.float32)
    runners, calls = stack_runners(model, find_architecture(model)), []
    tower = model.base_model.get_encoder(modality="image")
    tower.register_forward_hook(lambda *_: calls.append(1))
    for loaded in iterate_blocks(model, runners, None, [inputs] * 3, with_dense=True):
        loaded.run()
    assert len(calls) == 3 + more


def halve(block):
    """Halve the linears of a block."""
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= 0.5


@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl"])
def test_the_text_reads_the_pruned_tower_and_that_of_the_dense_model_its_own(tmp_path, model_type):
    folder = write_vision(tmp_path, model_type)
    checkpoint = open_checkpoint(folder)
    inputs = ImageReader(read_processor(folder), 96, 1000).example()
    model = empty_model(checkpoint)
    text = find_architecture(model)
    towers = probe_towers(model, text, inputs)
    runners = stack_runners(model, replace(text, stacks=(*towers, *text.stacks)))
    weights = Weights(model, checkpoint, torch.float32, CPU)
    row = dict(inputs)
    bare = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": torch.ones(1, 1).long()}
    for loaded in iterate_blocks(model, runners, weights, [bare, row], with_dense=True):
        if loaded.runner.stack.tower:
            assert len(loaded.hidden) == 1  # that with an image
            loaded.fork_dense()
            halve(loaded.module)
        elif loaded.index == 0:
            assert [range(1), range(1, 2)] == loaded.samples
            pruned, dense = loaded.hidden[1].clone(), loaded.dense.hidden[1].clone()
            tower = model.base_model.get_submodule(towers[0].blocks)
            assert all(each.is_meta for each in tower.parameters())
    whole = stock.open_model(folder, dtype=torch.float32)
    torch.testing.assert_close(dense, first_input(whole, inputs))
    for block in whole.base_model.get_submodule(towers[0].blocks):
        halve(block)
    torch.testing.assert_close(pruned, first_input(whole, inputs))
    assert not torch.allclose(pruned, dense)
