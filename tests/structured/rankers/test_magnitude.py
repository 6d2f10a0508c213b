"""Magnitude against the norms of weight slices."""

import pytest
import torch

import prunekit
from prunekit.models.orientation import weight_matrix
from tests.support.rankers import flat
from tests.support.units import randomized_model


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "gpt_neox", "llama", "phi3", "t5"])
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_a_unit_that_was_made_tiny_has_the_lowest_magnitude(model_type, kind):
    """Wrong slices of fused or transposed matrices would change several units."""
    model = randomized_model(model_type)
    gates = getattr(prunekit, kind)(model)
    site = gates.linear_groups[1]
    with torch.no_grad():
        for part in (*site.writers, site.reader):
            weight = weight_matrix(part.linear)
            rows = part.index[1].flatten()
            if part is site.reader:
                weight[:, rows] *= 1e-3
            else:
                weight[rows] *= 1e-3
    scores = gates.score("magnitude")
    assert gates.prune(scores, 1 / len(flat(scores)))[0][:2] == (1, 1)
    rest = flat({name: score for name, score in scores.items() if name != site.name})
    assert scores[site.name][1] < 0.02 * rest.min()


def test_magnitude_is_the_sum_of_the_norms_of_q_k_v_and_o():
    """In GPT-2: columns of the three thirds of c_attn, rows of c_proj."""
    model = randomized_model("gpt2")
    attention = model.transformer.h[0].attn
    inner, outer = attention.c_attn.weight, attention.c_proj.weight
    head = slice(8, 16)
    q, k, v = (inner[:, third + 8 : third + 16] for third in (0, 32, 64))
    expected = sum(part.double().norm() for part in (q, k, v, outer[head]))
    scores = prunekit.heads(model).score("magnitude")
    torch.testing.assert_close(scores["transformer.h.0.attn"][1], expected.detach())


def test_magnitude_of_a_group_adds_the_queries_and_outputs_of_its_heads():
    model = randomized_model("llama")
    attention = model.model.layers[0].self_attn
    q = attention.q_proj.weight.double().view(4, 8, 32).flatten(1).norm(dim=1)
    o = attention.o_proj.weight.T.double().reshape(4, 8, 32).flatten(1).norm(dim=1)
    k, v = (
        linear.weight.double().view(2, 8, 32).flatten(1).norm(dim=1)
        for linear in (attention.k_proj, attention.v_proj)
    )
    expected = (q + o).view(2, 2).sum(1) + k + v
    scores = prunekit.heads(model).score("magnitude")
    torch.testing.assert_close(scores["model.layers.0.self_attn"], expected.detach())
