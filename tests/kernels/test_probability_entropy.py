import math

import pytest
import torch
from prunekit_kernels import probability_entropy
from prunekit_kernels.probability_entropy import (
    TILE_T,
    _probability_entropy,
    probability_entropy_reference,
)

from tests.support.closeness import assert_close

SHAPES = [(1, 1, 1, 1), (2, 3, 9, 33), (1, 2, 8, TILE_T), (1, 1, 3, TILE_T + 1)]


def shares(shape, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(shape[-1])
    return (3 * torch.randn(shape, generator=generator)).softmax(-1).to(device, dtype)


def check(p, mask=None, valid=None):
    found = probability_entropy(p, mask, valid)
    exact = probability_entropy_reference(p.double(), mask, valid)
    plain = probability_entropy_reference(p, mask, valid)
    for ours, theirs, reference in zip(found, exact, plain, strict=True):
        assert_close(ours, theirs, reference.float())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_entropy_of_each_row(shape, dtype, device):
    check(shares(shape, device, dtype))


def test_certainty_has_none_and_evenness_the_most(device):
    p = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]], device=device)[None, None]
    found = probability_entropy(p)
    assert found.entropy.tolist() == pytest.approx([math.log(4)])
    assert found.log_keys.tolist() == pytest.approx([math.log(4)])
    assert found.rows.tolist() == [2]


def test_rows_that_do_not_add_up_are_divided_by_their_sum(device):
    p = shares((1, 2, 5, 20), device)
    found, same = probability_entropy(3 * p), probability_entropy(p)
    torch.testing.assert_close(found.entropy, same.entropy, rtol=1e-5, atol=0)


def test_what_is_masked_does_not_count(device):
    p = shares((2, 2, 5, 20), device)
    mask = torch.arange(20, device=device)[None, None, None] < 12
    found = check(p, mask)
    assert found.log_keys.tolist() == pytest.approx([10 * math.log(12)] * 2)


def test_padding_and_empty_rows_do_not_count(device):
    p = shares((2, 2, 5, 20), device)
    p[0, :, 0] = 0
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], device=device).bool()
    assert check(p, None, valid).rows.tolist() == [6, 6]


def test_any_strides(device):
    check(shares((2, 3, 40, 40), device).permute(1, 0, 3, 2)[:, :, ::2, 3:])


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)], ids=str)
def test_of_nothing_the_sums_are_zero(shape, device):
    assert not torch.stack(probability_entropy(torch.zeros(shape, device=device))).any()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"p": torch.ones(5, 5)}, "p must be"),
        ({"mask": torch.ones(1, 1, 2, 2).bool()}, "mask must be bool, broadcast to"),
        ({"valid": torch.ones(1, 1).bool()}, "valid must be bool of shape"),
    ],
)
def test_refuses_what_does_not_fit(given, reason):
    with pytest.raises(ValueError, match=reason):
        probability_entropy(**{"p": torch.ones(1, 1, 5, 5)} | given)


def test_is_a_proper_op(device):
    p = shares((1, 2, 5, 20), device)
    torch.library.opcheck(_probability_entropy, (p, None, None))


def test_compiles_without_graph_break(device):
    p = shares((1, 2, 5, 20), device)
    compiled = torch.compile(probability_entropy, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(p).entropy, probability_entropy(p).entropy)
