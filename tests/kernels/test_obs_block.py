import importlib

import pytest
import torch
from prunekit_kernels import NOfM, Sweep, inverse_factor, obs_block
from prunekit_kernels.obs_block import PANEL, _obs_block, obs_block_reference

from tests.kernels.layers import correlated
from tests.support.closeness import assert_close

CHOICES = [None, NOfM(1, 1), NOfM(1, 2), NOfM(2, 4), NOfM(4, 8), NOfM(2, 3), NOfM(5, 12)]
WIDE = [NOfM(1, 17), NOfM(16, 32)]  # of more than a panel of the kernel
names = str
module = importlib.import_module("prunekit_kernels.obs_block")


def sweep(outputs, inputs, *, kept=0.5, device="cpu", dtype=torch.float32):
    """Return the state of a sweep before its first column."""
    weight, gram = correlated(outputs, inputs)
    generator = torch.Generator().manual_seed(outputs + inputs)
    keep = torch.rand(inputs, outputs, generator=generator) < kept
    upper = inverse_factor(gram.float(), 0.01).upper
    parts = weight.T.contiguous().to(dtype), torch.empty(inputs, outputs, dtype=dtype)
    return Sweep(*(part.to(device) for part in (*parts, keep, upper.to(dtype))))


def copied(state, dtype):
    work, errors, keep, upper = state[:4]
    return Sweep(
        work.to(dtype, copy=True), errors.to(dtype, copy=True), keep.clone(), upper.to(dtype)
    )


def check(state, start, end, choice):
    ours, exact, plain = (
        copied(state, dtype) for dtype in (torch.float32, torch.float64, torch.float32)
    )
    obs_block(ours, start, end, choice)
    obs_block_reference(exact, start, end, choice)
    obs_block_reference(plain, start, end, choice)
    assert (ours.keep == exact.keep).float().mean() >= 0.999
    agree = (ours.keep == exact.keep).all(0) & (plain.keep == exact.keep).all(0)
    block = slice(start, end)
    for name in ("work", "errors"):
        parts = [getattr(part, name)[block, agree] for part in (ours, exact, plain)]
        assert_close(*parts)
    assert not ours.work[block][~ours.keep[block]].any()
    assert torch.equal(ours.work[:start], state.work[:start])
    assert torch.equal(ours.work[end:], state.work[end:])
    assert torch.equal(ours.keep[end:], state.keep[end:])


# In the interpreter a block of 128 columns takes about 4 s for any number of rows: use few.
@pytest.mark.parametrize("outputs", [1, 31, 33, 4097])
def test_is_the_published_block_for_any_rows(outputs, device):
    check(sweep(outputs, 3 * PANEL, device=device), 0, 3 * PANEL, None)


@pytest.mark.parametrize("choice", CHOICES, ids=names)
def test_is_the_published_block_for_any_choice(choice, device):
    inputs = 48 if choice is None or 48 % choice.m == 0 else 45
    state = sweep(33, inputs, kept=1.0 if choice else 0.5, device=device)
    check(state, 0, inputs, choice)


@pytest.mark.parametrize("choice", WIDE, ids=names)
def test_is_the_published_block_for_groups_of_more_than_a_panel(choice, device):
    inputs = 34 if choice.m == 17 else 32
    check(sweep(3, inputs, kept=0.9, device=device), 0, inputs, choice)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("choice", "columns", "launches"),
    [
        (None, 32, [16]),
        (None, 21, [16, 5]),
        (None, 7, [7]),
        (NOfM(2, 4), 32, [16]),
        (NOfM(2, 3), 21, [15, 6]),
        (NOfM(9, 18), 36, [16, 2] * 2),
    ],
    ids=names,
)
def test_every_column_is_swept_by_the_kernel(choice, columns, launches, device, monkeypatch):
    launch, panels = module._launch, []

    def counted(*given):
        panels.append(given[-1])
        launch(*given)

    monkeypatch.setattr(module, "_launch", counted)
    monkeypatch.delattr(module, "_in_cache")
    obs_block(sweep(3, columns, device=device), 0, columns, choice)
    assert panels == launches


@pytest.mark.parametrize("span", [(0, 0), (0, 1), (5, 6), (16, 32), (7, 30), (40, 61)], ids=str)
def test_touches_only_its_columns(span, device):
    check(sweep(9, 61, device=device), *span, None)


def test_a_whole_block_of_128(device):
    check(sweep(33, 128, kept=1.0, device=device), 0, 128, NOfM(2, 4))


def test_chooses_among_what_may_stay(device):
    state = sweep(40, 32, kept=0.7, device=device)
    check(state, 0, 32, NOfM(2, 4))
    ours = copied(state, torch.float32)
    obs_block(ours, 0, 32, NOfM(2, 4))
    assert not (ours.keep & ~state.keep).any()
    allowed = state.keep.unflatten(0, (-1, 4)).sum(1)
    assert torch.equal(ours.keep.unflatten(0, (-1, 4)).sum(1), allowed.clamp_max(2))


def test_of_equal_scores_the_lower_index_stays(device):
    state = sweep(3, 16, kept=1.0, device=device)
    state.work.fill_(1.0)
    state.upper.copy_(torch.eye(16))
    obs_block(state, 0, 16, NOfM(2, 4))
    assert torch.equal(state.keep, (torch.arange(16, device=device) % 4 < 2)[:, None].expand(16, 3))


def test_nan_goes_before_any_other(device):
    state = sweep(3, 16, kept=1.0, device=device)
    state.work.fill_(1.0)
    state.work[::4] = float("nan")
    state.work[1::4] = float("inf")
    state.upper.copy_(torch.eye(16))
    obs_block(state, 0, 16, NOfM(2, 4))
    # Only the first four are chosen before NaN reaches the others.
    assert state.keep[:4].T.tolist() == 3 * [[False, True, True, False]]


def test_a_factor_stored_by_columns_is_the_same(device):
    state = sweep(5, 32, device=device)
    ours, other = copied(state, torch.float32), copied(state, torch.float32)
    other = other._replace(upper=other.upper.T.contiguous().T)
    obs_block(ours, 0, 32)
    obs_block(other, 0, 32)
    assert torch.equal(ours.work, other.work)


@pytest.mark.interpret
def test_rows_are_the_same_to_the_bit_within_a_slice(device):
    state = sweep(70, 48, device=device)
    whole = copied(state, torch.float32)
    part = Sweep(*(tensor[:, 33:].contiguous() for tensor in state[:3]), state.upper)
    obs_block(whole, 0, 48)
    obs_block(part, 0, 48)
    assert torch.equal(whole.work[:, 33:], part.work)


def test_same_bits_each_time(device):
    first, second = (sweep(20, 40, device=device) for _ in range(2))
    obs_block(first, 0, 40)
    obs_block(second, 0, 40)
    assert torch.equal(first.work, second.work)


def test_is_a_proper_op(device):
    torch.library.opcheck(_obs_block, (*sweep(4, 16, device=device), 0, 16, 2, 4))


def test_compiles_without_graph_break(device):
    compiled, eager = (sweep(4, 16, device=device) for _ in range(2))
    torch.compile(obs_block, backend="aot_eager", fullgraph=True)(compiled, 0, 16)
    obs_block(eager, 0, 16)
    assert torch.equal(compiled.work, eager.work)
