"""Fragment order against an emulator of the tables in the PTX manual."""

import pytest
import torch
from prunekit_kernels.fragments24 import (
    _computed,
    from_fragments,
    has_fragments,
    to_fragments,
    token_fragments,
)
from prunekit_kernels.sparse24 import compress24

from tests.kernels.sparse import two_of_four
from tests.support.closeness import assert_close

DTYPES = [torch.bfloat16, torch.float16]


def halves(registers, dtype):
    """Return the two 16-bit floats of each register, the lower first."""
    return registers.contiguous().view(dtype).view(*registers.shape, 2).float()


def mma_sp(weight, tokens, total, meta, selector, dtype):
    """Emulate mma.sp.m16n8k32 of one warp.

    Registers are [32, 4], metadata [32].

    PTX ISA, "Matrix fragments for sparse mma.m16n8k32": of A, register r of lane (g, t) holds row
    g + 8 (r mod 2), kept columns 2t + 8 (r div 2) and the next; of B, row 2t + 8r and the next,
    column g; of C and D, row g + 8 (r div 2), column 2t + r mod 2. Metadata of rows g and g + 8,
    for half h of the columns, is in lane 4g + 2 selector + h.
    """
    a, b = halves(weight, dtype), halves(tokens, dtype)
    kept, right, out = torch.zeros(16, 16), torch.zeros(32, 8), torch.zeros(16, 8)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for r in range(4):
            column = 2 * t + 8 * (r // 2)
            kept[g + 8 * (r % 2), column : column + 2] = a[lane, r]
            right[2 * t + 8 * r : 2 * t + 8 * r + 2, g] = b[lane, r]
            out[g + 8 * (r // 2), 2 * t + r % 2] = total[lane, r]
    left = torch.zeros(16, 32)
    for row in range(16):
        for group in range(8):
            word = int(meta[4 * (row % 8) + 2 * selector + group // 4]) & 0xFFFFFFFF
            nibble = word >> (16 * (row // 8) + 4 * (group % 4)) & 15
            left[row, 4 * group + (nibble & 3)] = kept[row, 2 * group]
            left[row, 4 * group + (nibble >> 2)] = kept[row, 2 * group + 1]
    out += left @ right
    result = torch.empty(32, 4)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for r in range(4):
            result[lane, r] = out[g + 8 * (r // 2), 2 * t + r % 2]
    return result


def emulated(x, fragments):
    """Return the output of the kernel, product by product."""
    tokens, outputs, inputs, dtype = len(x), len(fragments.values), x.shape[1], x.dtype
    weight = fragments.values.view(torch.int32).view(-1, inputs // 32, 32, 4)
    meta = fragments.keep.view(torch.int32).view(-1, inputs // 256, 32, 4)
    right = token_fragments(x)
    y = torch.zeros(tokens, outputs)
    for tile in range(outputs // 16):
        for group in range(len(right)):
            total = torch.zeros(32, 4)
            for k in range(inputs // 32):
                words = meta[tile, k // 8, :, k % 8 // 2]
                total = mma_sp(weight[tile, k], right[group, k], total, words, k % 2, dtype)
            for lane in range(32):
                for r in range(4):
                    t, o = 8 * group + 2 * (lane % 4) + r % 2, lane // 4 + 8 * (r // 2)
                    if t < tokens:
                        y[t, 16 * tile + o] = total[lane, r]
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_tensor_cores_read_the_fragments_as_the_matrix(dtype):
    x, weight = torch.randn(11, 512).to(dtype), two_of_four(32, 512, dtype)
    y = emulated(x, to_fragments(compress24(weight)))
    assert_close(y, x.double() @ weight.double().T, x.float() @ weight.float().T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fragments_are_a_permutation_and_come_back(dtype):
    compressed = compress24(two_of_four(48, 512, dtype))
    fragments = to_fragments(compressed)
    for part, permuted, back in zip(compressed, fragments, from_fragments(fragments), strict=True):
        assert permuted.shape == part.shape
        assert permuted.dtype == part.dtype
        assert torch.equal(back, part)
    assert torch.equal(fragments.values.flatten().sort()[0], compressed.values.flatten().sort()[0])


def test_casting_commutes_with_permuting():
    compressed = compress24(two_of_four(16, 256, torch.bfloat16))
    cast = compressed._replace(values=compressed.values.half())
    assert torch.equal(to_fragments(cast).values, to_fragments(compressed).values.half())


@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype", "fits"),
    [
        (4096, 11008, torch.bfloat16, True),
        (4096, 896, torch.bfloat16, False),
        (24, 256, torch.float16, False),
        (16, 256, torch.float32, False),
    ],
)
def test_says_what_fits(outputs, inputs, dtype, fits):
    assert has_fragments(outputs, inputs, dtype) is fits


@pytest.mark.parametrize("back", [True, False])
def test_tables_are_those_of_the_pairs(back, device):
    table = _computed(device, back=back).tolist()
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    codes = {1 << i | 1 << j: i | j << 2 for i, j in pairs}
    for bits in range(256):
        low, high = bits & 15, bits >> 4
        if low in codes and high in codes:
            code = codes[low] | codes[high] << 4
            assert table[code if back else bits] == (bits if back else code)
    assert sum(value > 0 for value in table) == 36
