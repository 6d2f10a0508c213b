"""Heads and neurons from Python: nothing is final until it is finalised."""

import pytest
import torch

import prunekit
from prunekit.errors import ConfigError, ShapeError
from prunekit.structured.batches import mean_loss
from prunekit.structured.rankers.obs import BlockObs
from tests.support.units import answers, batch, restless

TOKENS = torch.randint(3, 96, (12, 10), generator=torch.Generator().manual_seed(4))


def test_prunes_exactly_what_was_asked_for_and_says_what():
    """Half and a quarter of all heads, as (layer, head, score)."""
    for sparsity, count in ((0.5, 4), (0.25, 2)):
        gates = prunekit.heads(restless("gpt2"))
        scores = gates.score("magnitude")
        removed = gates.prune(scores, sparsity)
        assert len(removed) == count == 8 - gates.active()
        for layer, unit, score in removed:
            site = gates.sites[layer].name
            assert not gates.keep[site][unit]
            assert score == scores[site][unit]


def test_each_step_can_be_taken_back_and_units_come_back_as_they_were():
    model = restless("llama")
    given = batch(model)
    dense = answers(model, given)
    gates = prunekit.heads(model)
    gates.gate(0, 1, 0.5)
    soft = answers(model, given)
    removed = gates.prune(gates.score("random"), 0.5)
    closed = answers(model, given)
    gates.reactivate([unit[:2] for unit in removed])
    assert torch.equal(answers(model, given), soft)
    assert not torch.equal(soft, dense)
    gates.undo()
    assert torch.equal(answers(model, given), closed)
    gates.undo()
    assert torch.equal(answers(model, given), soft)
    gates.undo()
    assert torch.equal(answers(model, given), dense)
    with pytest.raises(ConfigError, match="nothing is left to take back"):
        gates.undo()


def test_a_gate_that_is_trained_can_be_set_by_hand_and_goes_on_being_trained():
    """In-place on a leaf that wants a gradient, which torch refuses outside no_grad."""
    model = restless("llama")
    gates = prunekit.heads(model)
    value = next(iter(gates.gates.values())).value.requires_grad_()
    gates.gate(0, 1, 0.001)
    assert value.tolist() == [1, pytest.approx(0.001)]
    model(TOKENS, labels=TOKENS).loss.backward()
    assert value.grad is not None
    assert bool((value.grad != 0).all())


def test_gates_can_be_closed_at_once_and_follow_their_units_when_blocks_go():
    model = restless("llama", num_hidden_layers=3)
    given = batch(model)
    dense = answers(model, given)
    neurons, blocks = prunekit.neurons(model), prunekit.blocks(model)
    neurons.gate(2, 5, 0.5)
    soft = answers(model, given)
    neurons.close({place.name: torch.arange(64) > 20 for place in neurons.places})
    closed = answers(model, given)
    neurons.undo()
    assert torch.equal(answers(model, given), soft)
    neurons.undo()
    assert torch.equal(answers(model, given), dense)
    neurons.gate(2, 5, 0.5)
    neurons.close({place.name: torch.arange(64) > 20 for place in neurons.places})
    assert torch.equal(answers(model, given), closed)
    blocks.gates["model.layers"].keep[1] = False
    expected = answers(model, given)
    blocks.finalize()
    assert neurons.follow() == {
        "model.layers.0.mlp.down_proj": "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj": "model.layers.2.mlp.down_proj",
    }
    assert torch.equal(answers(model, given), expected)
    assert neurons.gates["model.layers.1.mlp.down_proj"].value[5] == 0.5


def test_active_units_are_those_above_the_threshold():
    gates = prunekit.heads(restless("bert"))
    gates.gate(0, 0, 0.005)
    gates.gate(0, 1, 0.05)
    assert gates.active() == 7
    assert gates.active(0.1) == 6


def test_a_half_open_gate_goes_into_the_weights():
    model = restless("gpt2")
    given = batch(model)
    gates = prunekit.heads(model)
    gates.gate(1, 3, 0.5)
    gates.prune(gates.score("magnitude"), 0.25)
    expected = answers(model, given)
    gates.finalize()
    assert (answers(model, given) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all(gate.factor.eq(1).all() for gate in gates.gates.values())


def test_finalize_says_what_was_kept_and_what_any_tool_makes_of_it():
    model = restless("llama")
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
    # Neurons that a config could say do not make a stock model of unequal heads.
    with pytest.raises(ShapeError, match=r"layers\.0\.self_attn: it and 1 others were left"):
        gates.finalize(stock=True)
    assert not gates.finalize().stock


def test_gates_stay_on_what_is_left_and_more_can_go():
    model = restless("llama", num_key_value_heads=4)
    given = batch(model)
    gates = prunekit.heads(model)
    for sparsity in (0.25, 0.34):
        gates.prune(gates.score("output-norm", TOKENS), sparsity)
        expected = answers(model, given)
        gates.finalize()
        assert (answers(model, given) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert sum(site.units for site in gates.sites) == 4


def test_rescoring_after_each_removal_sees_what_the_removed_ones_did():
    """Two heads that do the same: without the first, the second matters."""
    model = restless("gpt2")
    inner, outer = model.transformer.h[0].attn.c_attn, model.transformer.h[0].attn.c_proj
    with torch.no_grad():
        for third in (0, 32, 64):
            inner.weight[:, third + 8 : third + 16] = inner.weight[:, third : third + 8]
            inner.bias[third + 8 : third + 16] = inner.bias[third : third + 8]
        outer.weight[:16] *= 20
    gates = prunekit.heads(model)
    # What one of them gives the other gives too, so that with a refit neither is missed.
    before = gates.score("obs", TOKENS, damping=1e-6)["transformer.h.0.attn"]
    gates.gates["transformer.h.0.attn"].keep[0] = False
    after = gates.score("obs", TOKENS, damping=1e-6)["transformer.h.0.attn"]
    assert before[1] < 1e-3 * after[1]


def test_in_steps_as_many_go_and_one_of_two_that_do_the_same_stays():
    """Scored once, both of a pair look useless; scored anew, the one that is left does not."""
    model = restless("gpt2")
    given = batch(model)
    block = model.transformer.h[0].attn
    with torch.no_grad():
        for third in (0, 32, 64):
            part = block.c_attn.weight[:, third : third + 8]
            block.c_attn.weight[:, third + 8 : third + 16] = part
            block.c_attn.bias[third + 8 : third + 16] = block.c_attn.bias[third : third + 8]
        block.c_proj.weight[:16] *= 3
    dense = answers(model, given)
    gates = prunekit.heads(model)
    ranker = BlockObs(damping=1e-6)
    at_once = gates.prune(gates.score(ranker, TOKENS), 0.25)
    assert {unit[:2] for unit in at_once} == {(0, 0), (0, 1)}
    gates.undo()
    in_steps = gates.prune_in_steps(ranker, TOKENS, 0.25, steps=2)
    assert len(in_steps) == 2
    assert len({(0, 0), (0, 1)} & {unit[:2] for unit in in_steps}) == 1
    gates.undo()
    assert torch.equal(answers(model, given), dense)
    with pytest.raises(ConfigError, match="steps: 0"):
        gates.prune_in_steps(ranker, TOKENS, 0.25, steps=0)
    with pytest.raises(ConfigError, match="Ask for less"):
        gates.prune_in_steps(ranker, TOKENS, 0.9, steps=3)
    assert gates.active() == 8


def test_a_refit_lets_neurons_do_the_work_of_those_like_them():
    """Every neuron twice: without half of them, and with a refit, the answers are as before."""
    errors = []
    for data in (None, TOKENS):
        model = restless("llama")
        given = batch(model)
        with torch.no_grad():
            for layer in model.model.layers:
                for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                    linear.weight[32:] = linear.weight[:32]
        dense = answers(model, given)
        gates = prunekit.neurons(model)
        twins = {site.name: -torch.arange(64).double() for site in gates.sites}
        gates.prune(twins, 0.5, scope="layer")
        gates.finalize(data)
        errors.append(float((answers(model, given) - dense).norm() / dense.norm()))
    assert errors[0] > 0.2
    assert errors[1] < 0.03


def test_pruning_the_worst_heads_by_leave_one_out_costs_least():
    """The truth that rankers are judged by beats its own opposite on the data it looked at."""
    model = restless("gpt2")
    gates = prunekit.heads(model)
    scores = gates.score("leave-one-out", TOKENS)
    found = []
    for sign in (1, -1):
        gates.prune({name: sign * score for name, score in scores.items()}, 0.25)
        found.append(mean_loss(model, [{"input_ids": TOKENS}]))
        gates.undo()
    assert found[0] < found[1]


def test_on_a_trained_model_rankers_that_look_at_the_loss_beat_random(shared):
    """The loss is another once heads are gone, and those that a ranker takes cost less."""
    model = prunekit.load(shared / "models/stories260K")
    torch.manual_seed(0)
    start = torch.ones(8, 1, dtype=torch.int64)
    ids = model.generate(start, do_sample=True, max_new_tokens=63, pad_token_id=0)
    heads = prunekit.heads(model)
    dense = mean_loss(model, [{"input_ids": ids}])

    def without(scores):
        assert len(heads.prune(scores, 0.1)) == 2
        found = mean_loss(model, [{"input_ids": ids}])
        heads.undo()
        return found

    chance = [without(heads.score("random", seed=seed)) for seed in range(5)]
    assert all(found > dense for found in chance)
    for ranker in ("gradient", "leave-one-out"):
        assert without(heads.score(ranker, ids)) < sum(chance) / len(chance), ranker


def test_refuses_units_that_are_not_there():
    gates = prunekit.heads(restless("bert"))
    with pytest.raises(ConfigError, match=r"\(2, 0\): there is no such unit; layers go to 1"):
        gates.gate(2, 0, 0.5)
    with pytest.raises(ConfigError, match=r"\(0, 4\).*units to 3"):
        gates.reactivate([(0, 4)])


def test_a_model_in_training_is_in_training_after_it_was_scored():
    model = restless("llama").train()
    prunekit.heads(model).score("gradient", TOKENS)
    assert all(module.training for module in model.modules())
