"""Which linears an adapter is added to, by role or by name."""

import pytest

from prunekit.errors import ConfigError
from prunekit.training.adapter_targets import adapter_targets
from tests.support.architectures import tiny

ROLES = ("query", "key", "value", "output", "gate", "up", "down")


LINEARS = {
    "bert": "attention.self.query attention.self.key attention.self.value attention.output.dense "
    "- intermediate.dense output.dense",
    "gpt2": "attn.c_attn attn.c_attn attn.c_attn attn.c_proj - mlp.c_fc mlp.c_proj",
    "llama": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    "mlp.gate_proj mlp.up_proj mlp.down_proj",
    "phi3": "self_attn.qkv_proj self_attn.qkv_proj self_attn.qkv_proj self_attn.o_proj "
    "mlp.gate_up_proj mlp.gate_up_proj mlp.down_proj",
}


@pytest.mark.parametrize("model_type", LINEARS)
def test_a_role_stands_for_the_linear_of_the_family(model_type):
    model = tiny(model_type)
    for role, linear in zip(ROLES, LINEARS[model_type].split(), strict=True):
        if linear == "-":
            with pytest.raises(ConfigError, match=rf"'{role}' is no linear of .*Roles of this"):
                adapter_targets(model, role)
        else:
            assert adapter_targets(model, role) == [linear]


def test_a_role_stands_for_all_attentions_and_stacks():
    assert adapter_targets(tiny("t5"), ["query", "down"]) == [
        "layer.0.SelfAttention.q",
        "layer.1.EncDecAttention.q",
        "layer.1.DenseReluDense.wo",
        "layer.2.DenseReluDense.wo",
    ]


def test_names_are_taken_as_peft_takes_them_and_once():
    model = tiny("llama")
    assert adapter_targets(model, ["q_proj", "layers.0.mlp.up_proj", "q_proj"]) == [
        "q_proj",
        "layers.0.mlp.up_proj",
    ]
    assert adapter_targets(model, "all-linear") == "all-linear"
    for wrong in ("proj", "embed_tokens", "mlp"):
        with pytest.raises(ConfigError, match=f"'{wrong}' is no linear of Llama.*down_proj"):
            adapter_targets(model, [wrong])
    with pytest.raises(ConfigError, match="targets is empty"):
        adapter_targets(model, [])
