"""Stock models of a changed config: shapes without weights."""

import pytest

from prunekit.errors import ShapeError
from prunekit.models.units.kept_record import update_record
from prunekit.models.units.meta_model import format_entries, meta_model
from tests.support.architectures import tiny


def test_parameters_have_the_shapes_of_the_changed_config_and_no_storage():
    model = tiny("llama")
    update_record(model, [], {"model.layers.0.self_attn": 1})
    other = meta_model(model, {"intermediate_size": 48}, "neurons")
    assert {parameter.device.type for parameter in other.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in other.buffers()} == {"cpu"}
    assert other.model.layers[0].mlp.down_proj.weight.shape == (32, 48)
    assert model.model.layers[0].mlp.down_proj.weight.shape == (32, 64)


def test_a_config_that_transformers_refuses_is_named():
    with pytest.raises(ShapeError, match=r"heads: transformers refuses a config with .*= 3"):
        meta_model(tiny("llama"), {"num_attention_heads": 3}, "heads")
    assert format_entries({"a": 1, "b": 2}) == "a = 1, b = 2"
