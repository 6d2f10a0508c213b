"""Attention entropy of heads against the probabilities of eager attention."""

import torch

from prunekit.models.units.heads_neurons import linear_groups
from prunekit.structured.gated_model import GatedModel
from prunekit.structured.probes.attention_entropy import head_entropies
from tests.support.units import randomized_model


def test_the_entropy_is_that_of_the_eager_probabilities():
    model = randomized_model("llama")
    ids = torch.arange(3, 21).view(2, 9)
    groups = linear_groups(model, "heads")
    batches = [{"input_ids": part} for part in ids.split(1)]
    found = head_entropies(GatedModel(model, groups, {}, batches))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    for group, probabilities in zip(groups, maps, strict=True):
        p = probabilities.double()
        expected = -torch.special.xlogy(p, p).sum((0, 2, 3))
        torch.testing.assert_close(
            found[group.name].entropy.double().flatten(), expected, rtol=1e-4, atol=1e-5
        )
        assert set(found[group.name].rows.flatten().tolist()) == {18}
