"""Adapter layers of peft: the models in them, and models without them."""

import pytest
from torch import nn

from prunekit.architectures import find_architecture
from prunekit.architectures.adapters import (
    adapter_layers,
    bare_model,
    base_layer,
    is_adapter_layer,
    without_adapters,
)
from prunekit.errors import ConfigError
from tests.support.adapters import PEFT_WARNS, adapted_model
from tests.support.architectures import tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(*PEFT_WARNS)


def test_the_model_inside_one_of_peft_is_found_and_others_are_returned():
    model = tiny("llama")
    adapted = adapted_model("llama", ["q_proj"], base=model)
    assert bare_model(adapted) is bare_model(adapted.base_model) is bare_model(model) is model
    prompts = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"adds inputs .*get_base_model\(\)"):
        bare_model(peft.get_peft_model(tiny("llama"), prompts))


def test_without_adapters_a_model_has_the_modules_it_had():
    """Of a module that is trained as a copy, the copy; afterwards all is as before."""
    model = tiny("gpt2")
    before = dict(model.named_modules())
    adapted_model("gpt2", ["c_attn"], base=model, modules_to_save=["lm_head"])
    with_adapters = dict(model.named_modules())
    layers = adapter_layers(model)
    assert [*layers] == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn", "lm_head"]
    assert all(map(is_adapter_layer, layers.values()))
    with without_adapters(model):
        inside = dict(model.named_modules())
    assert inside.keys() == before.keys()
    changed = {name for name, module in inside.items() if module is not before[name]}
    assert changed == {"lm_head"}
    assert inside["lm_head"] is with_adapters["lm_head"].modules_to_save["default"]
    assert dict(model.named_modules()) == with_adapters
    attention = layers["transformer.h.0.attn.c_attn"]
    assert base_layer(attention) is before["transformer.h.0.attn.c_attn"]
    with pytest.raises(ZeroDivisionError), without_adapters(model):
        _ = 1 / 0
    assert dict(model.named_modules()) == with_adapters


def test_a_module_that_has_such_names_is_no_adapter_layer():
    module = nn.Module()
    module.base_layer = nn.Linear(2, 2)
    assert not is_adapter_layer(module)
    assert base_layer(module) is module


@pytest.mark.parametrize("model_type", ["llama", "starcoder2"])
def test_a_family_declared_or_probed_is_found_under_adapters(model_type):
    plain = find_architecture(tiny(model_type))
    assert find_architecture(adapted_model(model_type).get_base_model()) == plain


def test_adapters_of_a_module_that_is_replaced_are_lost_with_it():
    model = adapted_model("gpt2", ["c_attn"]).get_base_model()
    with without_adapters(model):
        model.set_submodule("transformer.h.0.attn.c_attn", nn.Identity())
    assert [*adapter_layers(model)] == ["transformer.h.1.attn.c_attn"]
    assert type(model.get_submodule("transformer.h.0.attn.c_attn")) is nn.Identity
