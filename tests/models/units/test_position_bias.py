"""Columns of a shared position bias track heads over several removals."""

import pytest
import torch
from torch import nn

from prunekit.architectures import Attention
from prunekit.models.units.position_bias import bias_columns, narrow_bias, select_bias_columns


@pytest.fixture
def declared():
    return Attention("self", "q", "k", "v", "o", bias="relative")


def test_columns_are_counted_as_before_the_first_removal(declared):
    module = nn.Module()
    assert bias_columns(module, [1, 2]) == [1, 2]
    select_bias_columns(module, declared, [0, 2, 3])
    assert bias_columns(module, [1, 2]) == [2, 3]
    select_bias_columns(module, declared, [1, 2])
    assert module.kept_heads == [2, 3]


def test_the_first_block_loses_the_columns_of_removed_heads(declared):
    module = nn.Module()
    module.relative = nn.Embedding(5, 4)
    whole = module.relative.weight.detach().clone()
    select_bias_columns(module, declared, [1, 3])
    narrow_bias(module, declared)
    assert torch.equal(module.relative.weight, whole[:, [1, 3]])
    assert module.relative.embedding_dim == 2
    assert not hasattr(module, "kept_heads")
