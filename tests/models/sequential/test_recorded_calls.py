"""Calls of blocks that are recorded in one forward of a model that reads images."""

import pytest
import torch
from torch import nn

from prunekit.architectures import find_architecture
from prunekit.errors import ConfigError
from prunekit.models.layout import stack_runners
from prunekit.models.sequential.context import Context
from prunekit.models.sequential.recorded_calls import (
    Answer,
    Caller,
    RecordedCalls,
    check_added,
    record_calls,
    to_run,
    without_cache,
)
from tests.support.family_configs import IMAGE_TOKEN, model_class, tiny_config

CPU = torch.device("cpu")


def called(change=lambda number, hidden: hidden, blocks=3, argument=None):
    """Return proxies after a forward that may change hidden states between blocks."""
    answer = Answer()
    callers = [Caller(nn.Linear(4, 4), answer) for _ in range(blocks)]

    def forward():
        hidden = torch.ones(1, 2, 4)
        for number, caller in enumerate(callers):
            hidden = caller(change(number, hidden), *([argument] if number and argument else []))

    forward()
    return callers, answer, forward


def test_what_is_added_between_blocks_is_found():
    feature = torch.tensor([[[0.0] * 4, [0.1, 0.2, -0.3, 0.4]]])
    callers, answer, forward = called(
        lambda number, hidden: hidden + feature if number == 1 else hidden
    )
    recorded = record_calls(callers, CPU)
    assert recorded.added.keys() == {1}
    assert torch.equal(recorded.added[1], feature)
    output = torch.randn(1, 2, 4)
    assert torch.equal(recorded.onward(0, output), output + feature)
    assert recorded.onward(1, output) is output
    answer.hidden = torch.randn(1, 2, 4)
    forward()
    check_added(callers, recorded)


def test_another_change_between_blocks_is_refused():
    feature = torch.randn(1, 2, 4)
    callers, answer, forward = called(
        lambda number, hidden: 2 * hidden + feature if number == 1 else hidden
    )
    recorded = record_calls(callers, CPU)
    answer.hidden = torch.randn(1, 2, 4)
    forward()
    with pytest.raises(ConfigError, match="changes the hidden states before block 1, other than"):
        check_added(callers, recorded)


def test_a_block_that_is_not_called_is_refused():
    callers, answer, _ = called()
    callers.append(Caller(nn.Linear(4, 4), answer))
    with pytest.raises(ConfigError, match="block 3 is not called"):
        record_calls(callers, CPU)


def test_an_argument_that_others_change_is_refused():
    answer = Answer(torch.zeros(1, 2, 4))
    caller = Caller(nn.Linear(4, 4), answer)
    caller(torch.ones(1, 2, 4), state=object())
    with pytest.raises(ConfigError, match="blocks are called with a object"):
        record_calls([caller], CPU)


def test_arguments_that_blocks_share_are_kept_once():
    mask = torch.ones(2, 2)
    answer = Answer(torch.zeros(1, 2, 4), tail=("weights",))
    callers = [Caller(nn.Linear(4, 4), answer) for _ in range(2)]
    for caller in callers:
        assert caller(torch.ones(1, 2, 4), mask, table={"cos": mask})[1] == "weights"
    recorded = record_calls(callers, torch.device("meta"))
    kept = [recorded.calls[0][0][0], recorded.calls[1][0][0], recorded.calls[1][1]["table"]["cos"]]
    assert all(each is kept[0] for each in kept)
    assert recorded[1][0][0].device.type == "meta"


def test_inputs_get_dtype_and_device_of_the_model():
    like = torch.zeros(1, dtype=torch.bfloat16)
    made = to_run({"input_ids": torch.ones(1, 2).long(), "pixel_values": torch.ones(1)}, like)
    assert made["input_ids"].dtype == torch.int64
    assert made["pixel_values"].dtype == torch.bfloat16


def test_the_cache_is_off_only_inside():
    config = tiny_config("qwen3_vl")
    config.text_config.use_cache = True
    with without_cache(config):
        assert config.text_config.use_cache is False
    assert config.text_config.use_cache is True


@pytest.fixture(scope="module")
def deepstack():
    config = tiny_config("qwen3_vl")
    config.vision_config.deepstack_visual_indexes = [0, 1]
    config.vision_config.patch_size = 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class("vlm", config)(config).eval()


def inputs_of(model):
    patch = model.config.vision_config.in_channels * 2 * 8 * 8
    ids = torch.tensor([[4, 5, *[IMAGE_TOKEN] * 4, 6, 7]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        "pixel_values": torch.randn(16, patch, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


@torch.no_grad()
def test_blocks_run_by_themselves_give_the_model_s_hidden_states(deepstack):
    """Features of the tower are added between blocks, and positions have three dimensions."""
    inputs = inputs_of(deepstack)
    seen = []
    blocks = deepstack.model.language_model.layers
    hooks = [block.register_forward_hook(lambda *each: seen.append(each[2])) for block in blocks]
    deepstack(**inputs)
    for hook in hooks:
        hook.remove()
    (runner,) = stack_runners(deepstack, find_architecture(deepstack))
    context = Context()
    hidden = runner.record(inputs, context)
    assert context.recorded.added.keys() == {1}
    for index in range(2):
        hidden = runner.bind(index, hidden, context)()
        added = context.recorded.added.get(index + 1, torch.zeros(()))
        torch.testing.assert_close(hidden, seen[index] + added)
    assert isinstance(context.recorded, RecordedCalls)


def test_inputs_that_the_model_does_not_take_are_refused(deepstack):
    (runner,) = stack_runners(deepstack, find_architecture(deepstack))
    inputs = inputs_of(deepstack)
    inputs["pixel_values"] = inputs["pixel_values"][:8]
    with pytest.raises(ConfigError, match="Qwen3VLForConditionalGeneration does not run on"):
        runner.record(inputs, Context())
