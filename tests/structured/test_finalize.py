"""Final removal: folded gate factors, refits, and configs of the result."""

import pytest
import torch

import prunekit
from prunekit.errors import ConfigError, ShapeError
from prunekit.models.units.blocks import block_groups
from tests.support.adapters import PEFT_WARNS, adapted_model
from tests.support.units import batch, close_whole, randomized_model, valid_logits

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


def test_a_model_keeps_a_head_and_an_unknown_attention_one_each():
    for model_type, numbers, message in (
        ("llama", (0, 1), "at least one of the heads is kept"),
        ("granite", (0,), "GraniteAttention"),
    ):
        model = randomized_model(model_type)
        gates = close_whole(model, "heads", numbers)
        before = {name: each.clone() for name, each in model.state_dict().items()}
        with pytest.raises(ConfigError, match=message):
            gates.finalize()
        assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_no_config_describes_a_layer_without_units():
    gates = close_whole(randomized_model("llama"), "neurons", (1,))
    with pytest.raises(ShapeError, match="blocks keep from 0 to 64"):
        gates.finalize(stock=True)


def test_others_are_refitted_beside_a_layer_that_is_taken_out():
    model = randomized_model("gpt2")
    gates = close_whole(model, "neurons", (0,))
    optimizer = torch.optim.AdamW(model.parameters())
    closed = [(1, unit) for unit in range(0, 128, 2)]
    gates.close({name: mask & (torch.arange(128) % 2 > 0) for name, mask in gates.keep.items()})
    done = gates.finalize(TOKENS, optimizer=optimizer)
    assert [len(units) for units in done.kept.values()] == [0, 128 - len(closed)]
    (group,) = optimizer.param_groups
    assert {*group["params"]} == {*model.parameters()}


@pytest.mark.filterwarnings(*PEFT_WARNS)
@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_adapters_and_their_state_are_lost_with_a_layer(model_type):
    adapted = adapted_model(model_type)
    model, given = adapted.get_base_model(), batch(adapted.get_base_model())
    adapted.train()
    for parameter in adapted.parameters():
        parameter.requires_grad_(True)  # noqa: FBT003
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3)
    labels = {"labels": given.get("labels", given["input_ids"])}
    adapted(**given | labels).loss.backward()
    optimizer.step()
    adapted.eval()
    gates = [close_whole(model, kind, (0,)) for kind in ("heads", "neurons")]
    expected = valid_logits(model, given)
    for each in gates:
        each.finalize(optimizer=optimizer)
    assert (valid_logits(model, given) - expected).abs().max() <= 1e-5 * expected.abs().max()
    (group,) = optimizer.param_groups
    assert {*group["params"]} == {*adapted.parameters()} >= {*optimizer.state}
    first, second = (
        sum("lora_" in name for name, _ in block.named_parameters())
        for block in block_groups(model)[0].blocks
    )
    assert first == 0
    assert second > 0
    optimizer.zero_grad()
    adapted(**given | labels).loss.backward()
    assert all(each.grad is not None for each in adapted.parameters())
    optimizer.step()
