import math

import pytest
import torch
from prunekit_kernels import apply, apply_all, pack, packed_mask, popcount, unpack
from prunekit_kernels.packed_mask import TILE_I, TILE_O, _apply, pack_reference, zero

SHAPES = [(1, 1), (3, 7), (5, 8), (2, 9), (TILE_O, TILE_I), (TILE_O + 1, TILE_I + 1)]
SHAPES += [(0, 9), (3, 0)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def mask(shape, device):
    return torch.rand(shape, device=device) > 0.5


def test_the_lowest_column_is_the_lowest_bit():
    keep = torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1, 0]]).bool()
    assert pack(keep).tolist() == [[0b1101, 1], [0b10000000, 0]]


@shapes
def test_packs_bit_by_bit_and_back(shape, device):
    keep = mask(shape, device)
    bits = pack(keep)
    assert torch.equal(bits, pack_reference(keep))
    assert torch.equal(unpack(bits, shape[1]), keep)
    assert torch.equal(popcount(bits), keep.sum(1))


@pytest.mark.parametrize("width", [1, 7, 8, 9, 64])
def test_counts_bits_of_rows_that_start_anywhere(width, device):
    bits = torch.randint(0, 256, (5, 3 * width + 3), dtype=torch.uint8, device=device)
    for part in (bits[:, 3:], bits[1:, :width], bits[:, 1 : 2 * width : 2]):
        assert torch.equal(popcount(part), unpack(part, 8 * part.shape[1]).sum(1))


def test_packs_masks_of_any_strides(device):
    keep = mask((24, 40), device)
    assert torch.equal(pack(keep.T), pack_reference(keep.T))
    assert torch.equal(pack(keep[::2, 1::3]), pack_reference(keep[::2, 1::3]))
    assert torch.equal(pack(keep[:1, 3:11]), pack_reference(keep[:1, 3:11]))
    bits = pack(keep)
    assert torch.equal(unpack(bits[:, 1:3], 16), keep[:, 8:24])


def test_every_byte_survives(device):
    bits = torch.arange(256, device=device).to(torch.uint8)[None]
    assert torch.equal(pack(unpack(bits, 2048)), bits)


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_zeroes_what_goes_and_nothing_else(shape, dtype, device):
    weight = torch.randn(shape, device=device).to(dtype)
    if weight.numel() > 2:
        weight.view(-1)[:2] = torch.tensor([math.nan, -math.inf])
    keep = mask(shape, device)
    expected = weight.masked_fill(~keep, 0)
    apply(weight, pack(keep))
    assert torch.equal(weight.nan_to_num(nan=7), expected.nan_to_num(nan=7))
    assert not torch.signbit(weight[~keep]).any()


def test_applies_to_weights_of_any_strides(device):
    canvas = torch.randn(40, 60, device=device)
    before, weight = canvas.clone(), canvas.T[3:, ::2]
    keep = mask(weight.shape, device)
    before.T[3:, ::2].masked_fill_(~keep, 0)
    apply(weight, pack(keep))
    assert torch.equal(canvas, before)


@pytest.mark.parametrize(
    "bits", [torch.zeros(4, 1).byte(), torch.zeros(3, 2).byte(), torch.zeros(4, 2)]
)
def test_refuses_bits_of_another_size_or_type(bits):
    with pytest.raises(ValueError, match=r"bits of 9 columns must be uint8 of shape \(4, 2\)"):
        apply(torch.ones(4, 9), bits)


def test_refuses_bits_elsewhere():
    with pytest.raises(ValueError, match="bits are on meta"):
        apply(torch.ones(4, 9), torch.zeros(4, 2, dtype=torch.uint8, device="meta"))


def test_is_a_proper_op(device):
    weight, keep = torch.randn(9, 20, device=device), mask((9, 20), device)
    torch.library.opcheck(_apply, (weight, pack(keep)))


def test_compiles_without_graph_break(device):
    weight, keep = torch.randn(9, 20, device=device), mask((9, 20), device)
    expected = weight.where(keep, 0)
    torch.compile(apply, backend="aot_eager", fullgraph=True)(weight, pack(keep))
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 9), (2, 3, 8), (2, 2, 3, 17), (0, 4), (300, 300)], ids=str)
def test_applies_one_mask_to_several_tensors(dtype, shape, device):
    keep = mask(shape, device)
    first = torch.randn(shape, device=device).to(dtype)
    turned = torch.randn(shape[::-1], device=device).permute(*range(len(shape))[::-1])
    values = [first, first.double(), turned, first.float().masked_fill(~keep, torch.nan)]
    expected = [value.where(keep, 0) for value in values]
    apply_all(pack(keep.flatten(0, -2)), *values)
    for value, wanted in zip(values, expected, strict=True):
        assert torch.equal(value, wanted)
        assert not torch.signbit(value[~keep]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_zeroes_also_in_place_of_nan(dtype):
    value = torch.tensor([[1.5, -2.0, torch.nan], [torch.inf, 0.0, -1.0]], dtype=dtype)
    keep = torch.tensor([[True, False, False], [False, True, True]])
    expected = torch.tensor([[1.5, 0, 0], [0, 0, -1]], dtype=dtype)
    filled = packed_mask.kept(value, keep, -torch.inf)
    assert torch.equal(filled, expected.masked_fill(~keep, -torch.inf))
    assert torch.equal(packed_mask.kept(value, keep), expected)
    zero(keep, value)
    assert torch.equal(value, expected)
    assert not bool(value.signbit()[~keep].any())
