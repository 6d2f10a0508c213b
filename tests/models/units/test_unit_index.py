"""Which rows of a linear belong to which unit, in each layout of query, key and value."""

import pytest
import torch
from torch import nn

from prunekit.architectures import Attention
from prunekit.models.units.unit_index import UnitIndex, output_owner, owner_of, projections


def attention(width, *, interleaved=False):
    """Return a block with one fused linear of ``width`` outputs, and its declaration."""
    block = nn.ModuleDict({"qkv": nn.Linear(4, width)})
    return block, Attention("", "qkv", "qkv", "qkv", "out", interleaved=interleaved)


@pytest.mark.parametrize(
    ("width", "interleaved", "rows"),
    [
        (12, False, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        (12, True, [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]),
        (8, False, [[0, 1, 2, 3], [4, 5], [6, 7]]),  # one key head for two queries
    ],
)
def test_rows_of_query_key_and_value(width, interleaved, rows):
    block, declared = attention(width, interleaved=interleaved)
    parts = projections(block, declared, torch.Size([2, 2]))
    assert [part.index.flatten().tolist() for part in parts] == rows
    assert all(part.linear is block["qkv"] and part.index.shape[1:] == (1, 2) for part in parts)


def test_the_owner_of_each_row_follows_from_the_rows_of_each_unit():
    """Units may have several parts, and a linear the rows of several roles."""
    queries, keys = torch.tensor([[[0, 1], [2, 3]], [[6, 7], [4, 5]]]), torch.tensor([[[9]], [[8]]])
    assert owner_of([queries]).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert owner_of([queries, keys]).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 0]
    fused, other = nn.Linear(2, 10), nn.Linear(2, 4)
    writers = [UnitIndex(fused, queries), UnitIndex(other, queries[:, :1]), UnitIndex(fused, keys)]
    assert torch.equal(output_owner(fused, writers), owner_of([queries, keys]))
