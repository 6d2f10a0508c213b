import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prunekit_kernels import salience
from prunekit_kernels._triton import INTERPRETED
from prunekit_kernels.salience import (
    PART,
    TILE_F,
    TILE_T,
    _salience,
    merge,
    new_state,
    salience_reference,
)

from tests.kernels.cases import cases
from tests.support.closeness import assert_close

SHAPES = [(1, 1), (7, 3), (TILE_T, TILE_F), (TILE_T + 1, TILE_F + 1), (PART + 1, 5), (3, 0)]


def gathered(h, g=None, valid=None):
    state = new_state(h.shape[1], h.device)
    salience(h, g, state, valid)
    return state


def check(h, g=None, valid=None):
    found = gathered(h, g, valid)
    exact = salience_reference(h.double(), None if g is None else g.double(), valid)
    plain = salience_reference(h.float(), None if g is None else g.float(), valid)
    for ours, theirs, reference in zip(found, exact, plain, strict=True):
        assert_close(ours, theirs, reference.float())


def pair(shape, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(shape[0])
    return (
        (torch.randn(shape, generator=generator) * scale).to(device, dtype) for scale in (1, 1e-3)
    )


@pytest.mark.parametrize(
    ("shape", "kind"),
    cases(
        SHAPES,
        ["float32", "float16", "bfloat16", "float64"],
        seldom=lambda shape, kind: kind != "float32" and shape[0] > TILE_T + 1,
    ),
    ids=str,
)
def test_is_the_sums_of_its_formula(shape, kind, device):
    check(*pair(shape, device, getattr(torch, kind)))


def test_without_gradients(device):
    h, _ = pair((70, 9), device)
    check(h)
    assert not gathered(h)[6:].any()


@pytest.mark.parametrize(("moments", "products"), [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("mean", [0, 100])
def test_what_is_left_out_stays_unchanged(mean, moments, products, device):
    h, g = pair((300, 5), device)
    h += mean
    whole, state = new_state(5, device), new_state(5, device)
    for rows in (slice(70), slice(70, None)):
        salience(h[rows], g[rows], whole)
        salience(h[rows], g[rows], state, moments=moments, products=products)
    left_out = [*(() if moments else (2, 3, 4)), *(() if products else (7, 8))]
    assert not state[left_out].any()
    rest = [row for row in range(9) if row not in left_out]
    torch.testing.assert_close(state[rest], whole[rest], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strides", ["transposed", "every other", "offset"])
def test_any_strides(strides, device):
    h, g = pair((70, 70), device)
    h = {"transposed": h.T, "every other": h[::2, ::2], "offset": h[3:, 5:]}[strides]
    check(h, g[: h.shape[0], : h.shape[1]])


def test_a_large_mean_after_padding_costs_no_digits(device):
    h, g = pair((300, 9), device)
    valid = torch.arange(300, device=device) >= 63
    check(h + 100, g, valid)


def test_padding_does_not_count(device):
    h, g = pair((90, 9), device)
    valid = torch.rand(90, generator=torch.Generator().manual_seed(0)).to(device) > 0.4
    h[~valid] = 1e6
    check(h, g, valid)
    assert not gathered(h, g, valid & False).any()


@pytest.mark.parametrize(("mean", "error"), [(0, 1e-6), (100, 1e-5), (1e4, 1e-3)])
def test_a_large_mean_leaves_the_kurtosis_its_digits(mean, error, device):
    h, _ = pair((PART + 100, 8) if INTERPRETED else (2000, 20), device)
    h = h + mean
    count, _, m2, _, m4 = gathered(h)[:5]
    d = h.double() - h.double().mean(0)
    exact = len(h) * (d**4).sum(0) / (d**2).sum(0) ** 2
    assert ((count * m4 / m2**2 - exact).abs() / exact).max() < error


def test_outliers_and_drift(device):
    h, g = pair((PART + 100, 8), device)
    h[0] = 300
    h[:, 3] += torch.linspace(0, 50, len(h), device=device)
    check(h, g)


def test_constant_columns_have_no_spread(device):
    h = torch.full((600, 4), 3.25, device=device)
    count, mean, m2, m3, m4 = gathered(h)[:5].tolist()
    assert count == [600] * 4
    assert mean == [3.25] * 4
    assert m2 == m3 == m4 == [0] * 4


MAGNITUDES = [(1e-30, 1e-30), (1e-12, 1e-12), (1e-12, 1e25), (1e12, 1e12), (1e35, 1e-35)]


@pytest.mark.parametrize(("loud", "steep"), MAGNITUDES, ids=str)
def test_large_and_tiny_magnitudes(loud, steep, device):
    # Zeros first, and columns of which some are 1e4 times as loud as others.
    h, g = pair((150, 9), device)
    h, g = h * loud, g * 1e3 * steep
    h[:66] = g[:66] = 0
    h[:, ::2] *= 1e-4
    found = gathered(h, g)
    exact = salience_reference(h.double(), g.double())
    size = exact.abs()
    size[1], size[3] = size[5] / 150, size[2] ** 1.5  # signed values may be near 0
    assert found.isfinite().all()
    assert ((found - exact).abs() <= 1e-4 * size).all()


@settings(deadline=None, max_examples=3 if INTERPRETED else 10)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9))
def test_parts_merge_into_the_whole(first, second, columns):
    h, g = pair((first + second, columns), "cpu")
    left, right = (gathered(h[rows], g[rows]) for rows in (slice(first), slice(first, None)))
    both = left.clone()
    merge(both, right)
    continued = left.clone()
    salience(h[first:], g[first:], continued)
    torch.testing.assert_close(both, continued, rtol=1e-12, atol=1e-12)
    whole = gathered(h, g)
    torch.testing.assert_close(both[:9], whole[:9], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[9], left[9] + right[9])


def test_ranks_merge_to_what_one_would_see(device):
    h, g = pair((800, 12), device)
    ranks = [gathered(a, b) for a, b in zip(h.split(200), g.split(200), strict=True)]
    total = new_state(12, device)
    for rank in ranks:
        merge(total, rank)
    exact = salience_reference(h.double(), g.double())
    torch.testing.assert_close(total[:9], exact[:9], rtol=1e-4, atol=1e-3)


def test_same_bits_each_time(device):
    h, g = pair((PART + 9, 3) if INTERPRETED else (1200, 40), device)
    assert torch.equal(gathered(h, g), gathered(h, g))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"state": torch.zeros(10, 3).double()}, "state must be float64 of shape"),
        ({"state": torch.zeros(10, 4)}, "state must be float64 of shape"),
        ({"g": torch.ones(5, 3)}, r"g must be of shape \(5, 4\)"),
        ({"valid": torch.ones(4).bool()}, r"valid must be bool of shape \(5,\)"),
        ({"valid": torch.ones(5, device="meta").bool()}, "on cpu, got torch.bool of shape .* meta"),
    ],
)
def test_refuses_what_does_not_fit(given, reason):
    given = {"h": torch.ones(5, 4), "g": None, "state": new_state(4)} | given
    with pytest.raises(ValueError, match=reason):
        salience(**given)


def test_is_a_proper_op(device):
    h, g = pair((9, 4), device)
    torch.library.opcheck(_salience, (h, g, new_state(4, device), None, True, False))


def test_compiles_without_graph_break(device):
    h, g = pair((9, 4), device)
    state = new_state(4, device)
    torch.compile(salience, backend="aot_eager", fullgraph=True)(h, g, state)
    assert torch.equal(state, gathered(h, g))
