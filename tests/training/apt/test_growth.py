"""Adapters that grow without a change of the output."""

import pytest
import torch

from prunekit.structured.optimizers import replace_parameters
from prunekit.training.apt.growth import (
    adapter_parameters,
    grow,
    grown_ranks,
    initialize,
    ranks_of,
    set_scale,
)
from prunekit.training.lora import add_adapter
from tests.support.adapters import PEFT_WARNS, randomize_adapters
from tests.support.units import batch, randomized_model, valid_logits

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(*PEFT_WARNS)


def test_the_more_important_half_grows_by_the_factor_up_to_the_most():
    ranks = {"a": 8, "b": 8, "c": 8, "d": 6}
    importance = {"a": 1.0, "b": 4.0, "c": 2.0, "d": 3.0}
    assert grown_ranks(ranks, importance, 1.4, 64) == {"b": 11, "d": 8}
    assert grown_ranks(ranks, importance, 9.0, 10) == {"b": 10, "d": 10}
    assert grown_ranks(ranks, importance, 1.0, 64) == {}
    assert grown_ranks({"a": 4}, {"a": 0.0}, 2.0, 64) == {"a": 8}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_growth_changes_no_logit_and_keeps_the_moments(model_type):
    model = randomized_model(model_type)
    add_adapter(model, 2, ["query", "value"])
    randomize_adapters(model)
    given = batch(model)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    model(**given).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    before, logits = adapter_parameters(model), valid_logits(model, given)
    moments = {each: optimizer.state[each] for pair in before.values() for each in pair}
    chosen = next(iter(before))
    changes = grow(model, {chosen: 5}, torch.Generator().manual_seed(1))
    replace_parameters(optimizer, changes, set())
    # Only the order of additions in the product may differ.
    torch.testing.assert_close(valid_logits(model, given), logits, atol=1e-6, rtol=0)
    assert ranks_of(model)[chosen] == 5
    down, up = adapter_parameters(model)[chosen]
    old_down, old_up = before[chosen]
    assert torch.equal(down[:2], old_down)
    assert torch.equal(up[:, :2], old_up)
    assert bool((up[:, 2:] == 0).all())
    assert bool((down[2:] != 0).all())
    for new, old, part in ((down, old_down, down[:2]), (up, old_up, up[:, :2])):
        state = optimizer.state[new]
        assert state["exp_avg"].shape == new.shape
        kept = state["exp_avg"][:2] if new is down else state["exp_avg"][:, :2]
        assert torch.equal(kept, moments[old]["exp_avg"])
        assert float(state["exp_avg"].abs().sum()) == pytest.approx(float(kept.abs().sum()))
        assert part.shape == old.shape
    assert down in set(optimizer.param_groups[0]["params"])
    model(**given).logits.square().mean().backward()
    optimizer.step()
    assert bool((up[:, 2:] != 0).any())


def test_the_scale_does_not_depend_on_the_rank():
    model = randomized_model("llama")
    add_adapter(model, 2, ["query"])
    set_scale(model, 2.0)
    randomize_adapters(model)
    layer = model.model.layers[0].self_attn.q_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 32)
    expected = layer.base_layer(x) + 2.0 * x @ (up @ down).T
    torch.testing.assert_close(layer(x), expected)


def test_rows_are_gaussian_and_follow_the_seed():
    model = randomized_model("llama")
    add_adapter(model, 8, ["query"])
    initialize(model, 5)
    first = [down.detach().clone() for down, _ in adapter_parameters(model).values()]
    initialize(model, 5)
    for before, (down, up) in zip(first, adapter_parameters(model).values(), strict=True):
        assert torch.equal(before, down)
        assert not bool(up.any())
    every = torch.cat([each.flatten() for each in first])
    assert float(every.var() * 32) == pytest.approx(1, rel=0.2)
    assert not torch.equal(first[0], first[1])
