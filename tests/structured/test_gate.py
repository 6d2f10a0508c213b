"""Gates: identity at 1, removal at 0, differentiable in between."""

import pytest
import torch

from prunekit.models.units.heads_neurons import linear_groups
from prunekit.structured.gate import Gate
from tests.support.architectures import TINY
from tests.support.units import batch, randomized_model, valid_logits


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_gates_at_one_leave_every_bit_and_a_gate_at_zero_does_not(model_type):
    """The output must change, since an unused gate would have no effect."""
    model = randomized_model(model_type)
    given = batch(model)
    before = valid_logits(model, given)
    for kind in ("heads", "neurons"):
        gates = [Gate(site) for site in linear_groups(model, kind)]
        assert torch.equal(valid_logits(model, given), before)
        for gate in gates:
            gate.keep[::2] = False  # half of the units, since ReLU may already zero a single neuron
            assert not torch.equal(valid_logits(model, given), before)
            gate.keep[::2] = True
        for gate in gates:
            gate.detach()
    assert torch.equal(valid_logits(model, given), before)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama", "opt", "phi3", "t5"])
def test_a_gate_at_zero_is_the_weights_of_the_unit_at_zero(model_type):
    """The reference has zeros in the reading linear's columns."""
    model, other = randomized_model(model_type), randomized_model(model_type)
    given = batch(model)
    for kind in ("heads", "neurons"):
        for site in linear_groups(model, kind):
            Gate(site).keep[1] = False
        for site in linear_groups(other, kind):
            weight = site.reader.linear.weight.data
            columns = site.reader.index[1].flatten()
            (weight if model_type == "gpt2" else weight.T)[columns] = 0
    assert torch.equal(valid_logits(model, given), valid_logits(other, given))


def test_text_is_written_as_before_with_a_cache_and_padding_on_the_left():
    model = randomized_model("llama")
    given = batch(model, left=True)
    before = model.generate(**given, max_new_tokens=6, do_sample=False)
    gates = [Gate(site) for kind in ("heads", "neurons") for site in linear_groups(model, kind)]
    assert torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False), before)
    for gate in gates:
        gate.keep[0] = False
    assert not torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False), before)


def test_a_gate_has_the_gradient_of_finite_differences():
    model = randomized_model("gpt2").double()
    given = batch(model)
    gate = Gate(linear_groups(model, "heads")[0])
    value = torch.ones(4, dtype=torch.float64, requires_grad=True)
    with gate.holding(value):
        model(**given).logits.square().mean().backward()
    step = 1e-5
    found = []
    for unit in range(4):
        ends = []
        for sign in (1, -1):
            moved = torch.ones(4, dtype=torch.float64)
            moved[unit] += sign * step
            with gate.holding(moved), torch.no_grad():
                ends.append(model(**given).logits.square().mean())
        found.append((ends[0] - ends[1]) / (2 * step))
    torch.testing.assert_close(value.grad, torch.stack(found), rtol=1e-6, atol=1e-9)


def test_training_cannot_open_a_pruned_unit_and_sends_it_no_update():
    """A pruned gate gets no gradient, while a trainable 0 would reopen."""
    model = randomized_model("llama")
    given = batch(model)
    site = linear_groups(model, "heads")[0]
    gate = Gate(site)
    gate.keep[0] = False
    gate.value.requires_grad_()
    optimizer = torch.optim.SGD([gate.value, *model.parameters()], lr=0.1)
    query = site.writers[0]
    rows = query.index[0].flatten()
    before = query.linear.weight[rows].clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(**given, labels=given["input_ids"]).loss.backward()
        optimizer.step()
    assert gate.value.tolist()[0] == 1
    assert gate.value.tolist()[1] != 1
    assert gate.factor.tolist()[0] == 0
    assert torch.equal(query.linear.weight[rows], before)
    assert not torch.equal(
        query.linear.weight[query.index[1].flatten()],
        randomized_model("llama").get_submodule(site.name).q_proj.weight[query.index[1].flatten()],
    )


def test_a_gate_may_differ_from_sample_to_sample_where_a_model_joins_batch_and_tokens():
    model = randomized_model("opt")
    given = batch(model)
    site = linear_groups(model, "neurons")[0]
    gate = Gate(site)
    value = torch.ones(2, 1, site.units)
    value[1] = 0
    with torch.no_grad():
        dense = model(**given).logits
        with gate.holding(value):
            mixed = model(**given).logits
        with gate.holding(torch.zeros(site.units)):
            closed = model(**given).logits
    torch.testing.assert_close(mixed[0], dense[0], rtol=0, atol=0)
    torch.testing.assert_close(mixed[1], closed[1], rtol=0, atol=0)


@pytest.mark.slow
def test_compiles_into_one_graph_with_its_model():
    model = randomized_model("llama")
    given = batch(model)
    gate = Gate(linear_groups(model, "heads")[0])
    gate.keep[1] = False
    expected = valid_logits(model, given)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits_of(compiled, given), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def logits_of(model, given):
    return model(**given, use_cache=False).logits[given["attention_mask"].bool()]
