"""Salience of units from the steps of a training, against plain sums in float64."""

import pytest
import torch

import prunekit
from prunekit.distributed.ranks import SINGLE
from prunekit.errors import NumericsError
from prunekit.structured.batches import losses
from prunekit.training.apt.growth import adapter_parameters
from prunekit.training.apt.salience import (
    STEP_TOKENS,
    RunningMean,
    StepSalience,
    adapter_salience,
)
from prunekit.training.lora import add_adapter
from tests.support.adapters import PEFT_WARNS, randomize_adapters
from tests.support.units import batch, randomized_model

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(*PEFT_WARNS)


def adapted(model_type="llama"):
    model = randomized_model(model_type)
    gates = [prunekit.heads(model), prunekit.neurons(model)]
    add_adapter(model, 2, ["query", "value"])
    randomize_adapters(model)
    for each in gates:
        for gate in each.gates.values():
            gate.value.requires_grad_()
    return model, [group for each in gates for group in each.groups]


def step(model, given):
    loss, count = losses(model, given)
    (loss.sum() / count.sum()).backward()


def plain_scores(model, groups, given):
    """Return (Σ|h|)(Σ|g|) of the valid tokens, Σ|h| scaled to a full window, in float64."""
    inputs, found = {}, {}
    handles = [
        group.reader.linear.register_forward_hook(
            lambda module, args, _, name=group.name: inputs.__setitem__(name, args[0])
        )
        for group in groups
    ]
    loss, count = losses(model, given)
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(loss.sum() / count.sum(), [inputs[g.name] for g in groups])
    valid = given["attention_mask"].bool()
    for group, gradient in zip(groups, gradients, strict=True):
        h, g = inputs[group.name].detach()[valid].double(), gradient[valid].double()
        product = h.abs().sum(0) * STEP_TOKENS / len(h) * g.abs().sum(0)
        found[group.name] = product.unflatten(0, (group.units, -1)).sum(1)
    return found


def test_the_sums_are_those_of_the_valid_tokens_of_the_step():
    model, groups = adapted()
    given = batch(model)
    expected = plain_scores(model, groups, given)
    with StepSalience(model, groups, outliers=False) as hooks:
        with torch.no_grad():
            model(**given)  # a teacher's forward is not seen
        step(model, given)
        found = hooks.scores({}, SINGLE)
        step(model, given)
        again = hooks.scores({}, SINGLE)
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=1e-5, atol=0)
        torch.testing.assert_close(again[name], found[name], rtol=1e-6, atol=0)


def test_the_root_of_the_kurtosis_is_added():
    model, groups = adapted()
    given = batch(model)
    found = []
    for outliers in (False, True):
        with StepSalience(model, groups, outliers=outliers) as hooks:
            step(model, given)
            found.append(hooks.scores({}, SINGLE))
    added = torch.cat([found[1][name] - found[0][name] for name in found[0]])
    assert float(added.min()) > -1e-12
    assert float(added.max()) > 0


def test_rows_of_adapters_are_added_to_the_units_that_have_them():
    model, groups = adapted()
    given = batch(model)
    step(model, given)
    adapters = {each: each.grad for pair in adapter_parameters(model).values() for each in pair}
    group = groups[0]
    layer = model.model.layers[0].self_attn
    expected = torch.zeros(group.units, dtype=torch.float64)
    for linear, heads in ((layer.q_proj, 4), (layer.v_proj, 2)):
        up = linear.lora_B["default"].weight
        rows = (up * up.grad).abs().double().sum(1).unflatten(0, (heads, -1)).sum(1)
        expected += rows.unflatten(0, (group.units, -1)).sum(1)
    torch.testing.assert_close(adapter_salience(group, adapters), expected)
    neurons = groups[-1]
    assert not bool(adapter_salience(neurons, adapters).any())


def test_a_checkpointed_forward_counts_once():
    model, groups = adapted()
    given, found = batch(model), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        with StepSalience(model, groups, outliers=False) as hooks:
            step(model, given)
            found.append(hooks.scores({}, SINGLE))
    for name, score in found[0].items():
        torch.testing.assert_close(found[1][name], score, rtol=1e-5, atol=0)


def test_a_salience_that_is_not_finite_names_the_unit():
    model, groups = adapted()
    with StepSalience(model, groups, outliers=False) as hooks:
        step(model, batch(model))
        hooks._states[1][6, 3] = torch.nan
        with pytest.raises(NumericsError, match=r"self_attn\.\d+ is nan"):
            hooks.scores({}, SINGLE)


def test_the_running_mean_follows_steps_and_kept_units():
    mean = RunningMean(0.75)
    mean.update({"a": torch.tensor([4.0, 8.0, 0.0])})
    mean.update({"a": torch.tensor([8.0, 0.0, 4.0])})
    assert mean.scores["a"].tolist() == [5.0, 6.0, 1.0]
    mean.keep({"a": [0, 2]})
    assert mean.scores["a"].tolist() == [5.0, 1.0]
