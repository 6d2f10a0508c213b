"""Output norm against the outputs of single heads."""

import pytest
import torch

import prunekit
from tests.support.rankers import TOKENS
from tests.support.units import randomized_model


def test_output_norm_is_the_mean_norm_of_what_a_head_adds():
    model = randomized_model("gpt2")
    gates = prunekit.heads(model)
    site = gates.linear_groups[0]
    seen = []
    site.reader.linear.register_forward_hook(lambda _, x, y: seen.append(x[0]))
    found = gates.score("output-norm", TOKENS)[site.name]
    x = torch.cat(seen).flatten(0, 1)
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        given = x[:, part] @ site.reader.linear.weight[part]
        assert float(found[head]) == pytest.approx(given.norm(dim=1).mean().item(), rel=1e-5)
