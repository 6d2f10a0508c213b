"""Random scores depend on the seed and the layer name only."""

import torch

from prunekit.methods.random import Random
from tests.support.methods import layer


def test_random_is_drawn_from_the_seed_and_the_name_of_the_layer():
    def keep(seed=0, name="model.layers.0.q_proj"):
        return Random(random_seed=seed).prune(layer(name=name)).keep

    state = torch.get_rng_state()
    first = keep()
    assert torch.equal(keep(), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(keep(seed=1), first)
    assert not torch.equal(keep(name="model.layers.1.q_proj"), first)
    assert not Random.needs
