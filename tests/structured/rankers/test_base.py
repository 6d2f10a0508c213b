"""Properties of every ranker, and rankers given by name or instance."""

import pytest
import torch

import prunekit
from prunekit.errors import ConfigError
from prunekit.structured.rankers import Ranker, rankers
from tests.support.architectures import TINY, tiny
from tests.support.rankers import TOKENS, flat
from tests.support.tiers import often
from tests.support.units import batch, randomized_model, skip_without_attention_interface


@pytest.mark.parametrize("model_type", often(sorted(TINY)))
def test_every_ranker_gives_each_unit_of_each_layer_one_finite_score(model_type):
    """Also with grouped queries, in T5's two stacks and in encoders."""
    model = randomized_model(model_type)
    skip_without_attention_interface(model)
    given = [batch(model)]
    for gates in (prunekit.heads(model), prunekit.neurons(model)):
        for name, kind in rankers().items():
            if gates.kind not in kind.kinds or (gates.kind, name) == ("neurons", "leave-one-out"):
                continue
            scores = gates.score(name, given)
            assert {site: len(score) for site, score in scores.items()} == {
                site.name: site.units for site in gates.linear_groups
            }
            assert flat(scores).isfinite().all()
            assert len(flat(scores).unique()) > 1, name
        gates.detach()


@pytest.mark.parametrize(
    ("kind", "ranker", "data", "message"),
    [
        ("neurons", "entropy", TOKENS, "ranker entropy: it ranks heads, not neurons"),
        ("heads", "entropie", TOKENS, "'entropie' is none. Choose: block-influence, entropy"),
        ("heads", "gradient", None, "there is none; pass tokens"),
        ("heads", "gradient", [{"ids": TOKENS}], "reads input_ids, and a batch has only ids"),
        ("heads", "random", None, "ranker random: sed: Extra inputs are not permitted"),
    ],
)
def test_refuses_what_cannot_be_scored(kind, ranker, data, message):
    gates = getattr(prunekit, kind)(tiny("llama"))
    settings = {"sed": 1} if ranker == "random" else {}
    with pytest.raises(ConfigError, match=message):
        gates.score(ranker, data, **settings)


def test_a_ranker_of_ones_own_is_taken_as_it_is():
    class First(Ranker):
        name = "first"
        needs_data = False

        def score(self, subject):
            return {site.name: torch.arange(site.units).double() for site in subject.groups}

    found = prunekit.heads(tiny("bert")).score(First())
    assert flat(found).tolist() == [0, 1, 2, 3] * 2
