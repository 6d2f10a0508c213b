"""T5: two stacks in the full model, one in the encoder-only model."""

import pytest
from transformers import T5EncoderModel

from prunekit.architectures import find_architecture
from tests.support.architectures import assert_stages_match_forward, tiny


def test_encoder_of_t5_alone_has_one_stack():
    model = T5EncoderModel(tiny("t5").config).eval()
    assert [stack.module for stack in find_architecture(model).stacks] == ["encoder"]
    assert_stages_match_forward(model, find_architecture(model))


@pytest.mark.parametrize(
    ("kind", "inputs"), [("relu", ("wi",)), ("gated-gelu", ("wi_0", "wi_1"))], ids=["1.0", "1.1"]
)
def test_feed_forward_inputs_depend_on_the_version(kind, inputs):
    model = tiny("t5", feed_forward_proj=kind)
    encoder, decoder = find_architecture(model).stacks
    for stack, layer in ((encoder, 1), (decoder, 2)):
        block = model.base_model.get_submodule(stack.blocks)[0]
        names = {name for name, _ in block.named_modules()}
        present = [name for name in stack.feed_forwards[0].inputs if name in names]
        assert present == [f"layer.{layer}.DenseReluDense.{name}" for name in inputs]
        assert all(stack.is_optional(name) for name in stack.feed_forwards[0].inputs)
