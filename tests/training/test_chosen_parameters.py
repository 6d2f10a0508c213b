"""Kinds of parameters are found by what they are."""

import pytest

from prunekit.training.chosen_parameters import chosen_parameters
from prunekit.training.lora import add_adapter
from tests.support.architectures import tiny
from tests.training.apt.test_loop import CLASSIFIER

pytest.importorskip("peft")


def test_norms_biases_and_the_head_are_trained_where_asked():
    model = tiny("bert", head=CLASSIFIER)
    add_adapter(model, 2, ["query"])
    names = {each: name for name, each in model.named_parameters()}

    def found(*kinds):
        return {names[each].removeprefix("bert.") for each in chosen_parameters(model, kinds)}

    assert found("head") == {"classifier.weight", "classifier.bias"}
    assert all("LayerNorm" in name for name in found("norms"))
    assert len(found("norms")) == 2 * (1 + 2 * 2)
    assert "encoder.layer.0.attention.self.query.base_layer.bias" in found("biases")
    assert not any("lora" in name for name in found("norms", "biases", "head"))


def test_routers_are_found_where_experts_are_understood():
    model = tiny("mixtral")
    names = {each: name for name, each in model.named_parameters()}
    found = {names[each] for each in chosen_parameters(model, ["routers"])}
    assert found == {name for name in names.values() if name.endswith("mlp.gate.weight")}
    assert found
    assert not chosen_parameters(tiny("llama"), ["routers"])


@pytest.mark.parametrize("model_type", ["gpt_oss", "jamba", "qwen3_next", "mamba"])
def test_norms_are_no_other_vectors(model_type):
    model = tiny(model_type)
    names = {each: name for name, each in model.named_parameters()}
    found = [names[each] for each in chosen_parameters(model, ["norms"])]
    assert found
    assert all("norm" in name for name in found)
