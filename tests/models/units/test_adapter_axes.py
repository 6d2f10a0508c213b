"""Coordinates of the residual stream in adapters of the linears that read and write it."""

import pytest

from prunekit.errors import ConfigError
from prunekit.models.units.find import unit_groups
from tests.support.adapters import PEFT_WARNS, adapted_model
from tests.support.architectures import tiny

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(*PEFT_WARNS)


def test_readers_have_a_column_of_a_and_writers_a_row_of_b_for_each_coordinate():
    model = adapted_model("llama", ["q_proj", "o_proj", "embed_tokens", "lm_head"])
    base = model.get_base_model()
    (group,) = unit_groups(base, "hidden")
    (plain,) = unit_groups(tiny("llama"), "hidden")
    added = {id(axis.parameter): axis.axis for axis in group.axes[len(plain.axes) :]}
    expected = {
        id(base.lm_head.lora_A["default"].weight): 1,
        id(base.model.embed_tokens.lora_embedding_B["default"]): 0,
    }
    for layer in base.model.layers:
        expected[id(layer.self_attn.q_proj.lora_A["default"].weight)] = 1
        expected[id(layer.self_attn.o_proj.lora_B["default"].weight)] = 0
    assert added == expected


def test_a_copy_that_is_trained_is_refused():
    model = adapted_model("llama", ["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match="lm_head: its adapter is a ModulesToSaveWrapper"):
        unit_groups(model.get_base_model(), "hidden")
