"""REAP against the sums that it is made of."""

import torch

import prunekit
from prunekit.structured.gated_model import GatedModel
from prunekit.structured.probes.expert_outputs import expert_sums
from tests.support.rankers import TOKENS
from tests.support.units import randomized_model


def test_reap_is_a_mean_over_routed_tokens_and_output_norm_one_over_all():
    model = randomized_model("mixtral")
    gates = prunekit.experts(model)
    gates.gate(0, 2, 0.0)
    sums = expert_sums(
        GatedModel(model, gates.groups, gates.gates, [{"input_ids": TOKENS}]), outputs=True
    )
    reap, norms = (gates.score(name, TOKENS) for name in ("reap", "output-norm"))
    for name, each in sums.items():
        torch.testing.assert_close(reap[name], each.outputs / each.routed.clamp_min(1))
        torch.testing.assert_close(norms[name], each.outputs / TOKENS.numel())
    assert float(reap[gates.groups[0].name][2]) == 0  # it gets no token
