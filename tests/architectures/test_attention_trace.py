"""What a call of the attention function tells of the linears around it."""

import pytest
import torch
from torch import nn

from prunekit.architectures.attention_trace import AttentionCall, storage_id, trace_attention
from tests.support.units import batch, randomized_model


def call(heads: int, groups: int, offset: int, stride: int) -> AttentionCall:
    """Return a call with heads of 8 features."""
    return AttentionCall(nn.Identity(), heads, groups, 8, None, None, offset, stride, equal=True)


@pytest.mark.parametrize(
    ("heads", "groups", "offset", "stride", "interleaved"),
    [
        (4, 4, 64, 8, False),
        (4, 4, 16, 24, True),
        (4, 2, 48, 8, False),
        (4, 2, 24, 32, True),
        (4, 4, 8, 24, None),  # query, value, key
        (4, 2, 0, 8, None),
    ],
)
def test_the_place_of_the_values_tells_the_order_in_one_linear(
    heads, groups, offset, stride, interleaved
):
    width = 8 * (heads + 2 * groups)
    assert call(heads, groups, offset, stride).interleaved(width) is interleaved
    assert call(heads, groups, offset, stride).interleaved(width + 8) is None


def test_calls_are_recorded_inside_of_the_context_alone():
    model = randomized_model("modernbert").base_model
    given = batch(model)["input_ids"]
    with torch.no_grad(), trace_attention(model, model.config) as trace:
        model(given)
    assert {each.module for each in trace.calls} == {layer.attn for layer in model.layers}
    first = trace.calls[0]
    config = model.config
    assert (first.heads, first.size) == (config.num_attention_heads, first.module.head_dim)
    assert first.values != storage_id(given)
