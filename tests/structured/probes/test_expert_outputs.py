"""Sums over routed tokens against each expert computed by itself."""

import pytest
import torch
from torch.nn.functional import linear

import prunekit
from prunekit.structured.gated_model import GatedModel
from prunekit.structured.probes.expert_outputs import expert_sums
from tests.support.units import batch, randomized_model


@pytest.mark.parametrize("outputs", [False, True])
def test_sums_are_those_of_each_expert_by_itself_without_padding(outputs):
    model = randomized_model("mixtral")
    model.requires_grad_(requires_grad=False)
    gates, given = prunekit.experts(model), batch(model)
    group, seen = gates.groups[1], []
    group.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    with torch.no_grad():
        dense = model(**given).logits
    hidden, chosen, shares = seen[0]
    valid = given["attention_mask"].bool().flatten()
    found = expert_sums(GatedModel(model, gates.groups, gates.gates, [given]), outputs=outputs)
    sums = found[group.name]
    assert sums.tokens == valid.sum()
    for expert in range(4):
        tokens, places = (chosen.eq(expert) & valid[:, None]).nonzero(as_tuple=True)
        gate, up = linear(hidden[tokens], group.module.gate_up_proj[expert]).chunk(2, -1)
        each = linear(group.module.act_fn(gate) * up, group.module.down_proj[expert])
        weights = shares[tokens, places]
        assert float(sums.routed[expert]) == len(tokens)
        assert float(sums.shares[expert]) == pytest.approx(float(weights.sum()), rel=1e-5)
        expected = float((weights * each.norm(dim=1)).sum()) if outputs else 0
        assert float(sums.outputs[expert]) == pytest.approx(expected, rel=1e-5)
    assert "forward" not in vars(group.module)
    with torch.no_grad():
        assert torch.equal(model(**given).logits, dense)
