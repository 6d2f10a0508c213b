"""Formats: what was stored comes back, and what cannot be stored is said."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.checkpoint.compressed import pack, unpack
from prunekit.checkpoint.formats import format_named, formats
from prunekit.errors import ConfigError
from tests.kernels.sparse import two_of_four, unstructured

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weight_for(kind, outputs, inputs, dtype, empty=0.1):
    made = two_of_four if kind == "2:4" else unstructured
    return made(outputs, inputs, **({"empty": empty} if kind == "2:4" else {})).to(dtype)


def test_names():
    assert sorted(formats()) == ["2:4", "bitmask", "dense"]
    with pytest.raises(ConfigError, match=r'"4:2" is not a format\. Choose: 2:4, bitmask, dense'):
        format_named("4:2")


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["2:4", "bitmask", "dense"]),
    st.integers(1, 6),
    st.integers(1, 12),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_what_was_packed_comes_back(kind, outputs, groups, dtype, transposed, seed):
    torch.manual_seed(seed)
    weight = weight_for(kind, outputs, 4 * groups, dtype)
    weight = weight.T.contiguous() if transposed else weight
    tensors, stored = pack(format_named(kind), "a.weight", weight, transposed=transposed)
    assert torch.equal(unpack(format_named(kind), "a.weight", tensors, stored), weight)
    if stored:
        assert stored.shape == tuple(weight.shape)
        assert tensors["a.weight"].shape != weight.shape
        parts = {name.removeprefix("a."): tensor for name, tensor in tensors.items()}
        assert format_named(kind).find_corruption(parts, (stored.outputs, stored.inputs)) is None


@pytest.mark.parametrize(
    ("kind", "weight", "reason"),
    [
        ("2:4", torch.ones(2, 8), "4 groups of four have more than two non-zeros"),
        ("2:4", torch.zeros(2, 6), r"shape \[2, 6\] has no groups of four inputs"),
        ("bitmask", torch.ones(2, 8), "only 0 of 16 weights are zero"),
        ("bitmask", torch.ones(2, 3, 4), "is no matrix"),
    ],
)
def test_what_does_not_fit_stays_dense(kind, weight, reason):
    import re

    assert re.search(reason, format_named(kind).why_not_storable(weight))
    assert pack(format_named(kind), "a.weight", weight, transposed=False)[1] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes(dtype):
    weight, bits = two_of_four(256, 512, dtype, empty=0.0), 8 * dtype.itemsize
    for kind, extra in (("2:4", 0), ("bitmask", 8 * 256)):
        parts, _ = pack(format_named(kind), "a.weight", weight, transposed=False)
        size = sum(part.nbytes for part in parts.values())
        assert size == weight.nbytes * (0.5 + 1 / bits) + extra


SPOILED = {
    "2:4": [
        ("weight", lambda t: t[:, :-1], "is not that of 2:4"),
        ("keep", lambda t: t[:-1], "keep bits have shape"),
        ("keep", lambda t: t | 1, "have another number of keep bits than two"),
        ("keep", lambda t: t.bool(), "keep has type torch.bool"),
        ("weight", lambda t: t.int(), "values have type torch.int32"),
    ],
    "bitmask": [
        ("weight", lambda t: t[:-1], "values for"),
        ("keep", lambda t: t[:-1], "keep bits have shape"),
        ("row_offsets", lambda t: t + 1, "row offsets do not count"),
        ("row_offsets", lambda t: t.int(), "row_offsets has type torch.int32"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "part", "spoil", "reason"),
    [(kind, *case) for kind, cases in SPOILED.items() for case in cases],
)
def test_parts_that_were_spoiled_are_unsound(kind, part, spoil, reason):
    torch.manual_seed(0)
    weight = weight_for(kind, 6, 16, torch.float32, empty=0.5)
    parts = format_named(kind).compress(weight)
    assert reason in format_named(kind).find_corruption(parts | {part: spoil(parts[part])}, (6, 16))
