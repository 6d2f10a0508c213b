"""Leave one out against a model with zeroed weights."""

import pytest

import prunekit
from tests.support.rankers import TOKENS
from tests.support.units import randomized_model


def test_leave_one_out_is_the_loss_without_the_unit_less_the_loss():
    model = randomized_model("gpt2")
    gates = prunekit.heads(model)
    found = gates.score("leave-one-out", TOKENS)["transformer.h.1.attn"]
    before = model(TOKENS, labels=TOKENS).loss
    model.transformer.h[1].attn.c_proj.weight.data[16:24] = 0
    after = model(TOKENS, labels=TOKENS).loss
    assert float(found[2]) == pytest.approx((after - before).item(), abs=1e-5)
