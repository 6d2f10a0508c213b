"""Blocks of vision towers, found in one forward on an image."""

import pytest
import torch

from prunekit.architectures import find_architecture
from prunekit.architectures.towers import probe_towers
from prunekit.data.images import ImageReader
from prunekit.errors import CheckpointError
from tests.support.vision import PROCESSORS, tiny_vision

BLOCKS = {
    "gemma3": "vision_tower.encoder.layers",
    "idefics3": "vision_model.encoder.layers",
    "llava": "vision_tower.encoder.layers",
    "paligemma": "vision_tower.encoder.layers",
    "qwen2_5_vl": "visual.blocks",
    "qwen3_vl": "visual.blocks",
}


def example(model_type):
    return ImageReader(PROCESSORS[model_type](), 96, 1000).example()


@pytest.mark.parametrize("model_type", sorted(BLOCKS))
def test_stages_are_those_of_a_forward(model_type):
    with torch.device("meta"):
        empty = tiny_vision(model_type)
    inputs = example(model_type)
    (stack,) = probe_towers(empty, find_architecture(empty), inputs)
    assert (stack.blocks, stack.tower) == (BLOCKS[model_type], 32)
    assert not stack.dense
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tiny_vision(model_type)
    block = model.base_model.get_submodule(stack.blocks)[0]
    reads = {}
    paths = [path for stage in stack.stages for path in stage.linears]
    assert sorted(paths) == sorted(
        path for path, each in block.named_modules() if isinstance(each, torch.nn.Linear)
    )
    for path in paths:
        block.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: reads.setdefault(path, args[0].clone())
        )
    with torch.no_grad():
        model(**inputs)
    for number, stage in enumerate(stack.stages):
        first = reads[stage.linears[0]]
        assert all(torch.equal(first, reads[path]) for path in stage.linears)
        others = [reads[each.linears[0]] for each in stack.stages[:number]]
        assert not any(first.shape == each.shape and torch.equal(first, each) for each in others)
    assert [*reads] == paths


def test_a_list_whose_modules_do_not_follow_each_other_is_no_tower():
    """Qwen3-VL has a list of modules beside its blocks, each of which reads one of them."""
    model = tiny_vision("qwen3_vl")
    assert len(model.model.visual.deepstack_merger_list) == len(model.model.visual.blocks)
    (stack,) = probe_towers(model, find_architecture(model), example("qwen3_vl"))
    assert stack.blocks == "visual.blocks"


def test_without_an_image_there_is_no_tower():
    model = tiny_vision("llava")
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
    with pytest.raises(CheckpointError, match="no list of blocks that an image passes through"):
        probe_towers(model, find_architecture(model), inputs)


def test_a_model_that_does_not_run_says_why():
    model, inputs = tiny_vision("qwen2_5_vl"), example("qwen2_5_vl")
    del inputs["image_grid_thw"]
    with pytest.raises(CheckpointError, match=r"passes through \(.*\), so there is no vision"):
        probe_towers(model, find_architecture(model), inputs)
