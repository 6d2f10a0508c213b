"""Optimizer steps that leave the weights of pruned units unchanged."""

import pytest
import torch

import prunekit
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
