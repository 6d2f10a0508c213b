"""Final removal: folded gate factors, refits, and configs of the result."""

import pytest
import torch

import prunekit
from prunekit.errors import ShapeError
from tests.support.units import batch, randomized_model, valid_logits

TOKENS = torch.randint(3, 96, (12, 10), generator=torch.Generator().manual_seed(4))


def test_a_half_open_gate_goes_into_the_weights():
    model = randomized_model("gpt2")
    given = batch(model)
    gates = prunekit.heads(model)
    gates.gate(1, 3, 0.5)
    gates.prune(gates.score("magnitude"), 0.25)
    expected = valid_logits(model, given)
    gates.finalize()
    assert (valid_logits(model, given) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all(gate.factor.eq(1).all() for gate in gates.gates.values())


def test_finalize_says_what_was_kept_and_what_any_tool_makes_of_it():
    model = randomized_model("llama")
    gates = prunekit.neurons(model)
    before = model.num_parameters()
    gates.prune(gates.score("magnitude"), 0.5, scope="layer")
    done = gates.finalize(stock=True)
    assert done.stock
    assert "any tool opens" in done.note
    assert {len(units) for units in done.kept.values()} == {32}
    assert done.parameters == (before, before - 2 * 32 * 3 * 32)
    assert done.parameters[1] == model.num_parameters()
    heads = prunekit.heads(model)
    heads.gates["model.layers.0.self_attn"].keep[0] = False
    before = model.state_dict()
    with pytest.raises(ShapeError, match="heads: blocks keep from 1 to 2"):
        heads.finalize(stock=True)
    assert model.state_dict().keys() == before.keys()
    done = heads.finalize()
    assert not done.stock
    assert "prunekit.load opens" in done.note
    # Expressible neuron counts do not make a model with unequal heads a stock one.
    with pytest.raises(ShapeError, match=r"layers\.0\.self_attn: it and 1 others were left"):
        gates.finalize(stock=True)
    assert not gates.finalize().stock


def test_gates_stay_on_what_is_left_and_more_can_go():
    model = randomized_model("llama", num_key_value_heads=4)
    given = batch(model)
    gates = prunekit.heads(model)
    for sparsity in (0.25, 0.34):
        gates.prune(gates.score("output-norm", TOKENS), sparsity)
        expected = valid_logits(model, given)
        gates.finalize()
        assert (valid_logits(model, given) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert sum(site.units for site in gates.linear_groups) == 4


def test_a_refit_lets_neurons_do_the_work_of_those_like_them():
    """With every neuron duplicated, pruning half and refitting preserves the output."""
    errors = []
    for data in (None, TOKENS):
        model = randomized_model("llama")
        given = batch(model)
        with torch.no_grad():
            for layer in model.model.layers:
                for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                    linear.weight[32:] = linear.weight[:32]
        dense = valid_logits(model, given)
        gates = prunekit.neurons(model)
        twins = {site.name: -torch.arange(64).double() for site in gates.linear_groups}
        gates.prune(twins, 0.5, scope="layer")
        gates.finalize(data)
        errors.append(float((valid_logits(model, given) - dense).norm() / dense.norm()))
    assert errors[0] > 0.2
    assert errors[1] < 0.03
