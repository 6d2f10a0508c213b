"""Blocks of towers that stay loaded: pruned for the pruned model, dense for the dense one."""

import torch
from torch import nn

from prunekit.models.sequential.kept_towers import KeptTowers


class Ones:
    """Stands for a source of weights: loads ones, drops to the meta device."""

    def load(self, module):
        module.weight = nn.Parameter(torch.ones(2, 2))

    def drop(self, module):
        module.weight = nn.Parameter(torch.ones(2, 2, device="meta"))


def test_weights_are_dense_only_inside():
    block, towers = nn.Linear(2, 2, bias=False), KeptTowers(Ones())
    with towers.loaded(block):
        block.weight = nn.Parameter(torch.zeros(2, 2))
    assert towers.modules == [block]
    with towers.dense():
        assert block.weight.sum() == 4
    assert block.weight.sum() == 0
    towers.drop()
    assert block.weight.is_meta
    assert not towers.modules


def test_a_model_with_weights_of_its_own_keeps_them():
    block, towers = nn.Linear(2, 2), KeptTowers(None)
    with towers.loaded(block), towers.dense():
        towers.drop()
    assert not block.weight.is_meta
