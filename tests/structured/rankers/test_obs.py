"""Block OBS against least squares in float64."""

import pytest
import torch

import prunekit
from prunekit.errors import NumericsError
from tests.support.rankers import TOKENS
from tests.support.units import randomized_model


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_block_obs_is_what_the_best_refit_without_the_unit_loses(kind):
    """tr(W_P [(H⁻¹)_PP]⁻¹ W_Pᵀ) against float64 least squares over the kept inputs."""
    model = randomized_model("llama")
    gates = getattr(prunekit, kind)(model)
    site = gates.linear_groups[0]
    seen = []
    handle = site.reader.linear.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    found = gates.score("obs", TOKENS, damping=1e-9, relative=False)[site.name]
    handle.remove()
    x = torch.cat(seen).flatten(0, 1).double()
    weight = site.reader.linear.weight.detach().double()
    for unit in range(2):
        keep = site.owner != unit
        fit = torch.linalg.lstsq(x[:, keep], x @ weight.T).solution
        lost = (x[:, keep] @ fit - x @ weight.T).square().sum() / len(x)
        assert float(found[unit]) == pytest.approx(float(lost), rel=2e-3)


def test_obs_says_when_inputs_are_all_zero():
    model = randomized_model("llama")
    gates = prunekit.heads(model)
    gates.gate(0, 0, 0.0)
    gates.gate(0, 1, 0.0)
    with pytest.raises(NumericsError, match=r"layers\.0\.self_attn: its inputs have a mean square"):
        gates.score("obs", TOKENS)
