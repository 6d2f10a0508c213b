"""Settings of gradual pruning: the model inside of wrappers, and counts of zeros."""

import pytest
import torch
from torch import nn

from prunekit import patterns
from prunekit.errors import ConfigError
from prunekit.models.layout import Linear
from prunekit.training.gradual_settings import (
    gradual_schedule,
    gradual_section,
    unwrapped_model,
    zeros_of,
)
from tests.support.architectures import tiny


def test_the_model_is_found_inside_of_wrappers():
    model = tiny("llama")
    assert unwrapped_model(model) is model
    assert unwrapped_model(nn.DataParallel(model)) is model
    assert unwrapped_model(torch.compile(model, backend="eager")) is model


def test_weights_that_are_sharded_are_refused():
    model = tiny("llama")
    next(model.parameters()).ds_id = 0  # as DeepSpeed marks them
    with pytest.raises(ConfigError, match="sharded over processes"):
        unwrapped_model(model)


def test_the_schedule_of_two_of_four_is_one_shot():
    section = gradual_section("magnitude", "2:4", None, {})
    assert gradual_schedule(section, None, {"end": 3}).name == "one-shot"
    section = gradual_section("magnitude", "unstructured", 0.5, {})
    assert gradual_schedule(section, None, {"end": 3}).name == "cubic"


@pytest.mark.parametrize(
    ("text", "sparsity", "zeros"),
    [("unstructured", 0.3, 8 * 4), ("2:4", 0.5, 64), ("block:2x4", 0.5, 64), ("row", 0.3, 32)],
)
def test_zeros_are_counted_as_the_pattern_makes_them(text, sparsity, zeros):
    linear = Linear("name", "path", 8, 16)
    assert zeros_of(patterns.parse(text), linear, sparsity) == zeros
    assert zeros_of(patterns.parse(text), linear, 0.0) == 0
