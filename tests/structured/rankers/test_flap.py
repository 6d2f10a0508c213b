"""FLAP against the variance of the observed inputs."""

import torch

import prunekit
from tests.support.rankers import TOKENS
from tests.support.units import randomized_model


def test_flap_is_the_variance_of_inputs_times_the_norm_of_their_weights():
    """The variance is over all batches; each layer's scores are then standardized."""
    model = randomized_model("llama")
    gates = prunekit.heads(model)
    site, seen = gates.linear_groups[0], []
    hook = site.reader.linear.register_forward_pre_hook(
        lambda _, x: seen.append(x[0].flatten(0, 1))
    )
    raw = gates.score("flap", TOKENS, standardised=False)[site.name]
    hook.remove()
    x = torch.cat(seen).double()
    each = x.var(0) * site.reader.linear.weight.double().square().sum(0)
    expected = each.detach()[site.reader.index].mean((1, 2))
    torch.testing.assert_close(raw, expected)
    scores = gates.score("flap", TOKENS)[site.name]
    torch.testing.assert_close(scores, (expected - expected.mean()) / expected.std())
