"""Models that callers pass: those without their weights in memory are refused."""

import pytest
import torch
from torch import nn

import prunekit
from prunekit.errors import ConfigError
from tests.support.architectures import tiny

TAKE_A_MODEL = {
    **{name: getattr(prunekit, name) for name in ("heads", "neurons", "blocks", "hidden")},
    "prune": lambda model: prunekit.prune(model, method="magnitude", pattern="2:4"),
}


def made_for_inference():
    with torch.inference_mode():
        return tiny("llama")


def half_on_meta():
    model = tiny("llama")
    model.model.layers[1].to("meta")
    return model


@pytest.mark.parametrize("name", TAKE_A_MODEL)
def test_every_function_refuses_what_it_cannot_change(name):
    call = TAKE_A_MODEL[name]
    for other in ("gpt2", None, nn.Linear(4, 4), tiny("llama").config, type(tiny("llama"))):
        with pytest.raises(ConfigError, match="is not a transformers model"):
            call(other)
    with pytest.raises(ConfigError, match=r"layers\.1\..*has no values in memory"):
        call(half_on_meta())
    with pytest.raises(ConfigError, match=r"made under torch\.inference_mode"):
        call(made_for_inference())
