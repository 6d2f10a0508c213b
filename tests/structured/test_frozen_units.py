"""Optimizer steps that leave the weights of pruned units unchanged."""

import pytest
import torch

import prunekit
from prunekit.errors import ConfigError
from tests.support.units import batch, randomized_model


@pytest.mark.parametrize("kind", ["heads", "neurons", "hidden", "blocks"])
def test_momentum_and_weight_decay_do_not_move_what_is_pruned(kind):
    """Pruned units keep their weights and have no optimizer momentum."""
    model = randomized_model("llama")
    given = batch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)

    def step():
        optimizer.zero_grad()
        model(**given, labels=given["input_ids"]).loss.backward()
        optimizer.step()

    gates = getattr(prunekit, kind)(model)
    step()
    gates.prune(gates.score("random"), 0.25 if kind == "hidden" else 0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with gates.hold(optimizer):
        step()
        step()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for place in gates.groups:
        gone = ~gates.keep[place.name]
        for parameter, axis, owner in place.parameter_axes:
            rows = gone[owner].nonzero().flatten()
            old = before[names[id(parameter)]].index_select(axis, rows)
            assert torch.equal(parameter.index_select(axis, rows), old)
            assert not optimizer.state[parameter]["exp_avg"].index_select(axis, rows).any()
    moved = [not torch.equal(value, before[name]) for name, value in model.state_dict().items()]
    assert any(moved)
    step()
    for place in gates.groups:  # weight decay applies again outside ``hold``
        for parameter, axis, owner in place.parameter_axes:
            rows = (~gates.keep[place.name])[owner].nonzero().flatten()
            old = before[names[id(parameter)]].index_select(axis, rows)
            assert not len(rows) or not torch.equal(parameter.index_select(axis, rows), old)


def test_units_are_held_in_a_model_that_was_cut_meanwhile():
    model = randomized_model("llama")
    given = batch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    gates = prunekit.neurons(model)
    with gates.hold(optimizer):
        for sparsity in (1 / 4, 1 / 3):
            gates.prune(gates.score("magnitude"), sparsity, scope="layer")
            weight = model.model.layers[0].mlp.up_proj.weight
            closed = ~gates.keep["model.layers.0.mlp.down_proj"]
            before = weight[closed].clone()
            model(**given, labels=given["input_ids"]).loss.backward()
            optimizer.step()
            assert len(before)
            assert torch.equal(weight[closed], before)
            gates.finalize(optimizer=optimizer)
    assert sum(group.units for group in gates.groups) == 64


def test_parts_of_flat_weights_are_refused(monkeypatch):
    model = randomized_model("llama")
    gates, optimizer = prunekit.heads(model), torch.optim.SGD(model.parameters())
    monkeypatch.setattr(model.lm_head.weight, "ds_id", 1, raising=False)
    with pytest.raises(ConfigError, match="hold: FSDP 1 and ZeRO-3 keep weights in flat tensors"):
        gates.hold(optimizer)
