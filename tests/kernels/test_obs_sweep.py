import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prunekit_kernels import NOfM, inverse_factor, obs_sweep
from prunekit_kernels._triton import INTERPRETED, runs_triton
from prunekit_kernels.obs_sweep import obs_sweep_reference

from tests.kernels.allocation import peak_bytes
from tests.kernels.cases import SELDOM
from tests.kernels.layers import correlated, loss


def layer(outputs, inputs, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(1000 * outputs + inputs)
    x = torch.randn(2 * inputs + 9, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    upper = inverse_factor((x.T @ x).float().to(device), 0.01).upper
    return weight.to(device, dtype), upper.to(dtype)


def half(score, start):
    """Keep the higher half of all scores, as published for unstructured sparsity."""
    lowest = score.flatten().argsort(stable=True)[: score.numel() // 2]
    keep = torch.ones_like(score, dtype=torch.bool).flatten()
    keep[lowest] = False
    return keep.view(score.shape)


def n_of_m(n, m):
    def choose(score, start):
        groups = score.unflatten(1, (-1, m))
        best = groups.topk(n, dim=2).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, best, True).flatten(1)  # noqa: FBT003

    return choose


def given_mask(keep):
    return lambda score, start: keep[:, start : start + score.shape[1]]


def both(weight, upper, choose, stride):
    ours, published = weight.clone(), weight.clone()
    keep = obs_sweep(ours, upper, choose, stride)
    expected = obs_sweep_reference(published, upper, choose, stride)
    return ours, published, keep, expected


CASES = {
    "half of a block": (half, None),
    "half of 5": (half, 5),
    "half of 200": (half, 200),
    "2:4": (n_of_m(2, 4), 4),
    "4:8": (n_of_m(4, 8), 8),
    "1:2": (n_of_m(1, 2), 2),
    "single columns": (half, 1),
}


@pytest.mark.parametrize("shape", [(24, 256), (9, 328), (1, 8), (130, 16)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_sweep(case, shape, device):
    weight, upper = layer(*shape, device=device)
    ours, published, keep, expected = both(weight, upper, *CASES[case])
    assert torch.equal(keep, expected)
    torch.testing.assert_close(ours, published, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (5, 1), (1, 7), (17, 133), pytest.param((40, 300), marks=SELDOM)],
    ids=str,
)
@pytest.mark.parametrize("stride", [None, 4])
def test_float32_with_a_given_mask(shape, stride, device):
    weight, upper = layer(*shape, device=device, dtype=torch.float32)
    mask = torch.rand(shape, device=device) > 0.5
    ours, published, keep, _ = both(weight, upper, given_mask(mask), stride)
    assert torch.equal(keep, mask)
    assert (ours - published).abs().max() <= 1e-5 * published.abs().max()


def test_pruned_weights_are_exactly_zero(device):
    weight, upper = layer(12, 140, device=device, dtype=torch.float32)
    keep = obs_sweep(weight, upper, n_of_m(2, 4), 4)
    assert (weight[~keep] == 0).all()
    assert keep.is_contiguous()


def test_compensates_better_than_zeroing(device):
    weight, upper = layer(16, 64, device=device)
    pruned = weight.clone()
    keep = obs_sweep(pruned, upper, n_of_m(2, 4), 4)
    hessian = torch.linalg.inv(upper.T @ upper)

    def error(other):
        return torch.einsum("oi,ij,oj->", other - weight, hessian, other - weight)

    assert error(pruned) < error(weight * keep)


@pytest.mark.parametrize("stays", [True, False])
def test_all_or_nothing(stays, device):
    weight, upper = layer(6, 150, device=device)
    mask = torch.full((6, 150), stays, device=device)
    before = weight.clone()
    assert torch.equal(obs_sweep(weight, upper, given_mask(mask), None), mask)
    assert torch.equal(weight, before if stays else torch.zeros_like(before))


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40), st.randoms(use_true_random=False))
def test_rows_are_independent(outputs, inputs, stride, random):
    weight, upper = layer(outputs, inputs)
    mask = torch.rand(outputs, inputs) > random.random()
    order = torch.randperm(outputs)
    straight, permuted = weight.clone(), weight[order]
    obs_sweep(straight, upper, given_mask(mask), stride)
    obs_sweep(permuted, upper, given_mask(mask[order]), stride)
    torch.testing.assert_close(permuted, straight[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 5, 16, 128, None])
def test_chooses_each_column_once_in_order(stride):
    weight, upper = layer(3, 133)
    seen = []

    def choose(score, start):
        seen.extend(range(start, start + score.shape[1]))
        return torch.ones_like(score, dtype=torch.bool)

    obs_sweep(weight, upper, choose, stride)
    assert seen == list(range(133))


def test_works_on_a_view_in_place(device):
    weight, upper = layer(8, 24, device=device)
    stored = weight.T.contiguous()
    expected = weight.clone()
    keep = obs_sweep(expected, upper, n_of_m(2, 4), 4)
    assert torch.equal(obs_sweep(stored.T, upper, n_of_m(2, 4), 4), keep)
    torch.testing.assert_close(stored.T, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty_weights_stay_empty(shape):
    keep = obs_sweep(torch.zeros(shape), torch.eye(shape[1]), half, None)
    assert keep.shape == shape


def test_refuses_another_factor():
    with pytest.raises(ValueError, match="upper must be"):
        obs_sweep(torch.zeros(2, 3), torch.eye(4), half, None)


def test_refuses_a_mask_of_another_shape():
    with pytest.raises(ValueError, match="choose returned"):
        obs_sweep(torch.zeros(2, 3), torch.eye(3), lambda score, start: score[:1] > 0, None)


# Choices that the sweep itself makes, and masks of allowed weights

INSIDE = [NOfM(1, 2), NOfM(2, 4), NOfM(4, 8), NOfM(3, 5), NOfM(8, 16), NOfM(5, 20), NOfM(16, 32)]
BLOCK = 128
LONG = 4097 if torch.cuda.is_available() else 1025
COLUMNS = (64, BLOCK, 129, 1000)


def shapes_and_choices():
    """Yield all row counts with all widths, and all choices with one."""
    for number, outputs in enumerate((1, 31, 33, 97 if INTERPRETED else LONG)):
        for place, inputs in enumerate(COLUMNS):
            small = outputs * inputs < 1e6
            # Interpreted, each row count is swept with one width, and each width with a row count.
            marks = SELDOM if small and number % 3 != place else []
            marks = marks if small else [pytest.mark.slow]
            yield pytest.param(outputs, inputs, None, marks=marks)
            if inputs % 4 == 0:
                yield pytest.param(outputs, inputs, NOfM(2, 4), marks=marks)
    yield pytest.param(5 if INTERPRETED else 33, 260, NOfM(2, 4))
    for choice in INSIDE:
        # Wide groups take the interpreter long: a few rows, and just beyond the first block.
        wide = choice.m > (8 if INTERPRETED else 16)
        inputs = (BLOCK // choice.m + 1 if wide else 10) * choice.m
        yield pytest.param(5 if wide else 33, inputs, choice)
        yield pytest.param(1, choice.m, choice)


@pytest.mark.parametrize(("outputs", "inputs", "choice"), [*shapes_and_choices()])
def test_float32_finds_what_the_published_sweep_finds_in_float64(outputs, inputs, choice, device):
    weight, gram = correlated(outputs, inputs, device=device, tokens=2 * inputs)
    upper = inverse_factor(gram.float(), 0.01).upper
    choose = n_of_m(*choice) if choice else half
    ours, exact = weight.float(), weight.clone()
    keep = obs_sweep(ours, upper, choice or half)
    expected = obs_sweep_reference(exact, upper.double(), choose, choice.m if choice else None)
    assert torch.equal(keep.sum(1), expected.sum(1)) or not choice
    assert keep.sum() == expected.sum()
    assert (keep == expected).float().mean() >= 0.999
    assert loss(ours, weight, gram) <= 1.001 * loss(exact, weight, gram)


def test_a_mask_given_is_one_that_a_function_gives(device):
    weight, upper = layer(9, 150, device=device)
    mask = torch.rand(9, 150, device=device) > 0.5
    first, second = weight.clone(), weight.clone()
    assert torch.equal(obs_sweep(first, upper, mask), mask)
    assert torch.equal(obs_sweep(second, upper, given_mask(mask)), mask)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("choose", "stride"),
    [(NOfM(2, 4), None), (n_of_m(2, 4), 4), (half, None)],
    ids=["2:4", "f", "half"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_may_not_stay_goes_first(choose, stride, dtype, device):
    weight, upper = layer(12, 64, device=device, dtype=dtype)
    allowed = torch.arange(64, device=device).expand(12, 64) % 4 > 0
    before = allowed.clone()
    keep = obs_sweep(weight, upper, choose, stride, allowed)
    assert not keep[~allowed].any()
    assert not weight[~keep].any()
    assert keep.sum() == 12 * 32
    assert torch.equal(allowed, before)


def test_what_may_not_stay_is_made_up_for(device):
    weight, upper = layer(8, 60, device=device)
    allowed = torch.rand(8, 60, device=device) > 0.3
    first, second = weight.clone(), weight.clone()
    everything = torch.ones_like(allowed)
    assert torch.equal(obs_sweep(first, upper, everything, allowed=allowed), allowed)
    obs_sweep(second, upper, allowed)
    assert torch.equal(first, second)


@pytest.mark.parametrize("choose", [NOfM(2, 4), NOfM(4, 8)], ids=str)
def test_a_slice_of_rows_is_pruned_as_among_all(choose, device):
    weight, upper = layer(33, 32, device=device, dtype=torch.float32)
    whole, parts = weight.clone(), [weight[:7].clone(), weight[7:].clone()]
    keep = obs_sweep(whole, upper, choose)
    assert torch.equal(torch.cat([obs_sweep(part, upper, choose) for part in parts]), keep)
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("choose", "allowed", "problem"),
    [
        (NOfM(2, 4), None, "2:4 needs 0 < n ≤ m and a multiple of 4 inputs, got 3"),
        (NOfM(4, 3), None, "4:3 needs"),
        (torch.ones(2, 4) > 0, None, "choose must be bool of shape"),
        (NOfM(1, 3), torch.ones(2, 3), "allowed must be bool of shape"),
    ],
)
def test_refuses_choices_that_do_not_fit(choose, allowed, problem):
    with pytest.raises(ValueError, match=problem):
        obs_sweep(torch.zeros(2, 3), torch.eye(3), choose, allowed=allowed)


def test_allocates_two_weights_and_two_masks_at_most(device):
    inputs = 256 if INTERPRETED else 512
    outputs = 256 if INTERPRETED else 512
    weight, upper = layer(outputs, inputs, device=device, dtype=torch.float32)
    mask = torch.rand(outputs, inputs, device=device) > 0.5
    # On a CPU the weight is swept where it is, in blocks of 128 columns; a kernel has a copy.
    block = BLOCK / inputs
    least, most = (2.5, 2.6 + block) if runs_triton(weight) else (1.25, 1.6 + block)
    for choose in (mask,) if INTERPRETED else (mask, NOfM(2, 4)):
        taken = peak_bytes(lambda choose=choose: obs_sweep(weight, upper, choose)) / weight.nbytes
        assert least <= taken <= most


def test_same_bits_each_time(device):
    weight, upper = layer(17, 40 if INTERPRETED else 140, device=device, dtype=torch.float32)
    first, second = weight.clone(), weight.clone()
    assert torch.equal(obs_sweep(first, upper, NOfM(2, 4)), obs_sweep(second, upper, NOfM(2, 4)))
    assert torch.equal(first, second)
