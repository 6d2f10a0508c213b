"""Records of a training: its learning rate, and which weights can be the best."""

from types import MappingProxyType

import pytest
import torch

from prunekit.config.train_table import Train
from prunekit.distributed.ranks import SINGLE
from prunekit.errors import ConfigError
from prunekit.training.measure import Measure, learning_rate
from tests.support.units import randomized_model


def test_the_rate_rises_and_falls_along_a_cosine():
    found = [learning_rate(step, Train(steps=100, rate=1.0)) for step in (1, 10, 55, 100)]
    assert found == pytest.approx([0.1, 1.0, 0.55, 0.1])
    assert learning_rate(100, Train(steps=10_000, rate=1.0)) == 1.0


class Pruned:
    """A pruning in force, which a test ends."""

    sparsity, achieved, done = 0.5, 0.25, False
    details = MappingProxyType({"units": {"heads": 3}})


def test_only_weights_from_after_the_pruning_are_restored():
    model, pruning = randomized_model("gpt2"), Pruned()
    model.requires_grad_(requires_grad=False)
    weight = model.transformer.ln_f.weight.requires_grad_()
    tokens = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(4))
    measure = Measure(model, [{"input_ids": tokens}], Train(), (), pruning, SINGLE)
    first = measure.record(0, is_measured=True)
    assert (first.sparsity, first.achieved, first.done) == (0.5, 0.25, False)
    assert first.details == {"units": {"heads": 3}}
    with pytest.raises(ConfigError, match=r"the sparsity is 0\.25, 0\.5 is due by now"):
        measure.restore_best()
    pruning.done = True
    kept = weight.detach().clone()
    measure.record(1, is_measured=True)
    weight.data.fill_(7)
    assert measure.record(2, is_measured=False).held_out is None
    measure.restore_best()
    assert torch.equal(weight, kept)
