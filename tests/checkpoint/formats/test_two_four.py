"""2:4 format: size, weights that it cannot store, corrupt parts."""

import re

import pytest
import torch

from prunekit.checkpoint.compressed import compress_weight
from prunekit.checkpoint.formats import format_named
from tests.kernels.sparse import two_of_four
from tests.support.formats import DTYPES

FORMAT = format_named("2:4")


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.ones(2, 8), "4 groups of four have more than two non-zeros"),
        (torch.zeros(2, 6), r"shape \[2, 6\] has no groups of four inputs"),
    ],
)
def test_what_does_not_fit_stays_dense(weight, reason):
    assert re.search(reason, FORMAT.why_not_storable(weight) or "")
    assert compress_weight(FORMAT, "a.weight", weight, transposed=False)[1] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes(dtype):
    weight, bits = two_of_four(256, 512, dtype, empty=0.0), 8 * dtype.itemsize
    parts, _ = compress_weight(FORMAT, "a.weight", weight, transposed=False)
    size = sum(part.nbytes for part in parts.values())
    assert size == weight.nbytes * (0.5 + 1 / bits)
