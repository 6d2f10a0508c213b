"""Exact masks: counts, ties, windows, spellings."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prunekit_kernels.selection import keep_highest

from prunekit.errors import ConfigError
from prunekit.patterns import parse, pruned_count, spellings
from prunekit.patterns.n_of_m import NOfM
from prunekit.patterns.tiles import Tiles
from prunekit.patterns.unstructured import BLOCK_COLUMNS, Unstructured

SCOPES = ["row", "layer", "block"]
scopes = pytest.mark.parametrize("scope", SCOPES)
sparsities = st.one_of(st.sampled_from([0.0, 0.29, 0.5, 1.0]), st.floats(0, 1))
seeds = st.integers(0, 1 << 30)
law = settings(deadline=None, max_examples=25)
few = st.integers(1, 6)
some = st.integers(1, 12)


@st.composite
def scores(draw, outputs=few, inputs=some, values=5):
    """Draw scores with many ties, some NaN and some inf."""
    shape = draw(outputs), draw(inputs)
    generator = torch.Generator().manual_seed(draw(seeds))
    score = torch.randint(0, values, shape, generator=generator).float()
    for value in (math.nan, math.inf):
        if draw(st.booleans()):
            score[torch.rand(shape, generator=generator) < 0.1] = value
    return score


def without_lowest(score, pruned):
    """Say in plain Python what stays of one group: of equals the lower index, NaN last of all."""
    worth = [-math.inf if math.isnan(value) else value for value in score.flatten().tolist()]
    order = sorted(range(len(worth)), key=lambda i: (worth[i], -i))
    keep = torch.ones(len(worth), dtype=torch.bool)
    keep[order[:pruned]] = False
    return keep.view(score.shape)


def groups(score, scope):
    if scope == "row":
        return [score[row : row + 1] for row in range(len(score))]
    return [score] if scope == "layer" else list(score.split(BLOCK_COLUMNS, dim=1))


# Counts


@law
@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_k_of_n_is_exactly_k(k, n):
    assert pruned_count(k / n, n) == min(k, n)


@law
@given(sparsities, st.integers(0, 10**6))
def test_the_count_is_within_one_of_the_sparsity(sparsity, size):
    count = pruned_count(sparsity, size)
    assert 0 <= count <= size
    assert sparsity * size - 1 < count <= sparsity * size + 1e-6


@pytest.mark.parametrize(
    ("sparsity", "size", "count"),
    [(0.29, 100, 29), (0.57, 100, 57), (0.5, 5, 2), (0.7, 10, 7), (0, 9, 0), (1, 9, 9), (1, 0, 0)],
)
def test_products_that_round_down_lose_nothing(sparsity, size, count):
    assert math.floor(0.29 * 100) == 28
    assert pruned_count(sparsity, size) == count


# Selection


@law
@given(scores(), st.integers(-1, 13))
def test_the_highest_stay_ties_keep_the_lower_index_and_nan_goes_first(score, kept):
    pruned = score.shape[1] - max(0, min(kept, score.shape[1]))
    expected = torch.cat([without_lowest(row, pruned) for row in score.split(1)])
    assert torch.equal(keep_highest(score, kept), expected)


def test_of_nothing_nothing_is_chosen():
    assert keep_highest(torch.zeros(3, 0), 0).shape == (3, 0)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:1x1", "block:2x2"])
def test_the_scores_are_left_alone(pattern):
    score = torch.tensor([[1.0, math.nan, 3, 3], [2, math.inf, 0, 0]])
    before = score.clone()
    parse(pattern).keep(score, 0.5)
    assert torch.equal(score.nan_to_num(nan=-1), before.nan_to_num(nan=-1))


# Unstructured


@scopes
@law
@given(scores(), sparsities)
def test_unstructured_prunes_the_lowest_of_each_group(scope, score, sparsity):
    keep = Unstructured(scope).keep(score, sparsity)
    for group, mask in zip(groups(score, scope), groups(keep, scope), strict=True):
        assert torch.equal(mask, without_lowest(group, pruned_count(sparsity, group.numel())))


@scopes
@law
@given(scores(st.integers(1, 5), st.integers(100, 400), 1000), sparsities)
def test_unstructured_counts_are_exact_whatever_the_size(scope, score, sparsity):
    keep = Unstructured(scope).keep(score, sparsity)
    if scope == "row":
        assert (~keep).sum(1).tolist() == [pruned_count(sparsity, score.shape[1])] * len(score)
    assert int((~keep).sum()) == (
        pruned_count(sparsity, score.shape[1]) * len(score)
        if scope == "row"
        else pruned_count(sparsity, score.numel())
    )
    for group, mask in zip(groups(score, scope), groups(keep, scope), strict=True):
        gone = sparsity * group.numel()
        assert abs(int((~mask).sum()) - gone) < 1 + 1e-6
        worst = group.nan_to_num(nan=-1)[mask].min() if mask.any() else math.inf
        assert not (group.nan_to_num(nan=-1)[~mask] > worst).any()


@scopes
@law
@given(st.integers(1, 5), st.integers(1, 400), sparsities)
@example(3, 129, 0.29)
def test_windows_of_columns_add_up_to_the_count_of_the_whole(scope, outputs, inputs, sparsity):
    pattern = Unstructured(scope)
    score = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(inputs))
    parts = [
        pattern.keep_columns(score[:, start : start + BLOCK_COLUMNS], start, sparsity)
        for start in range(0, inputs, BLOCK_COLUMNS)
    ]
    keep = torch.cat(parts, dim=1)
    assert keep.shape == score.shape
    assert keep.sum() == pattern.keep(score, sparsity).sum()
    if scope == "row":
        assert torch.equal(keep.sum(1), pattern.keep(score, sparsity).sum(1))


def test_only_scopes_that_look_at_some_columns_have_a_stride():
    assert Unstructured("row").stride == Unstructured("block").stride == BLOCK_COLUMNS
    assert Unstructured("layer").stride is None


@scopes
@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf])
def test_of_equal_scores_exactly_half_stay_and_of_these_the_first(scope, value):
    score = torch.full((4, 8), value)
    keep = Unstructured(scope).keep(score, 0.5)
    assert keep.sum() == 16
    first = keep[:, :4] if scope == "row" else keep[:2]
    assert first.all()


# Laws of all


PATTERNS = [
    *(Unstructured(scope) for scope in SCOPES),
    *map(parse, ["2:4", "1:2", "5:8", "block:2x4", "row", "column"]),
]
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)


FREE = [pattern for pattern in PATTERNS if pattern.sparsity is None]


@pytest.mark.parametrize("pattern", FREE, ids=lambda pattern: pattern.name)
@pytest.mark.parametrize(("sparsity", "stays"), [(0.0, True), (1.0, False)])
def test_sparsity_zero_keeps_all_and_one_keeps_nothing(pattern, sparsity, stays):
    keep = pattern.keep(torch.zeros(6, 136), sparsity)
    assert keep.dtype == torch.bool
    assert keep.all() if stays else not keep.any()


@patterns
@given(seed=seeds)
@law
def test_chosen_masks_do_not_break_their_pattern(pattern, seed):
    score = torch.randint(0, 4, (8, 16), generator=torch.Generator().manual_seed(seed)).float()
    assert pattern.misfit(8, 16) is None
    assert pattern.violations(pattern.keep(score, 0.5)) == 0


@pytest.mark.parametrize("pattern", [Unstructured("row"), parse("2:4"), parse("row")])
@given(seed=seeds, random=st.randoms(use_true_random=False))
@law
def test_permuting_rows_permutes_the_mask(pattern, seed, random):
    score = torch.rand(7, 16, generator=torch.Generator().manual_seed(seed))
    order = random.sample(range(7), 7)
    assert torch.equal(pattern.keep(score[order], 0.4), pattern.keep(score, 0.4)[order])


@patterns
@given(seed=seeds, power=st.integers(-20, 20))
@law
def test_scaling_the_scores_changes_nothing(pattern, seed, power):
    score = torch.rand(8, 16, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(pattern.keep(score * 2.0**power, 0.5), pattern.keep(score, 0.5))


@pytest.mark.parametrize("scope", SCOPES)
@given(seed=seeds, sparsity=sparsities)
@law
def test_a_higher_sparsity_keeps_a_part_of_what_a_lower_one_keeps(scope, seed, sparsity):
    score = torch.randint(0, 9, (4, 150), generator=torch.Generator().manual_seed(seed)).float()
    pattern = Unstructured(scope)
    more, less = pattern.keep(score, sparsity / 2), pattern.keep(score, sparsity)
    if scope == "block":  # counts of later windows are rounded together with those before
        assert int((less & ~more).sum()) <= 1
    else:
        assert not (less & ~more).any()


# Neighbours


@pytest.mark.parametrize("m", range(2, 33))
def test_n_of_m_keeps_the_n_highest_of_every_m(m):
    generator = torch.Generator().manual_seed(m)
    score = torch.randint(0, m, (5, 3 * m), generator=generator).float()
    score[0, 0], score[1, m], score[2, 2 * m - 1] = math.nan, math.inf, math.nan
    for n in range(1, m):
        keep = NOfM(n, m).keep(score, 0.0)
        expected = torch.cat([without_lowest(g, m - n) for g in score.view(-1, 1, m)])
        assert torch.equal(keep.view(-1, m), expected)


def test_n_of_m_of_all_nan_keeps_n():
    keep = NOfM(2, 4).keep(torch.full((3, 8), math.nan), 0.0)
    assert keep.tolist() == [[True, True, False, False] * 2] * 3


@law
@given(st.integers(2, 64), st.data())
def test_n_of_m_fixes_its_sparsity(m, data):
    n = data.draw(st.integers(1, m - 1))
    pattern = parse(f"{n}:{m}")
    assert pattern.sparsity == pytest.approx(1 - n / m)
    assert pattern.stride == m
    assert pattern.name == f"{n}:{m}"


def test_n_of_m_chosen_group_by_group_is_the_whole_mask():
    score = torch.rand(4, 24, generator=torch.Generator().manual_seed(0))
    pattern = NOfM(3, 8)
    parts = [pattern.keep_columns(score[:, at : at + 8], at, 0.0) for at in range(0, 24, 8)]
    assert torch.equal(torch.cat(parts, 1), pattern.keep(score, 0.0))


def test_ten_inputs_do_not_fit_two_of_four():
    assert NOfM(2, 4).misfit(7, 10) == "2:4 needs a multiple of 4 inputs, this layer has 10"
    assert NOfM(2, 4).misfit(7, 12) is None
    with pytest.raises(ValueError, match="neighbours have to divide it"):
        NOfM(2, 4).keep(torch.rand(3, 10), 0.0)


def test_groups_that_keep_more_than_n_are_counted():
    keep = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0]]).bool()
    assert NOfM(2, 4).violations(keep) == 2
    assert NOfM(4, 8).violations(keep) == 1
    assert NOfM(1, 2).violations(keep) == 4


# Tiles


TILES = [("block:2x3", 2, 3), ("block:1x1", 1, 1), ("row", 1, 12), ("column", 8, 1)]


@pytest.mark.parametrize(("text", "rows", "columns"), TILES)
@law
@given(scores(st.just(8), st.just(12)), sparsities)
def test_tiles_with_the_lowest_sums_go_whole(text, rows, columns, score, sparsity):
    pattern = parse(text)
    keep = pattern.keep(score, sparsity)
    assert pattern.violations(keep) == 0
    tiles = score.nan_to_num(nan=-math.inf, posinf=math.inf)
    tiles = tiles.view(8 // rows, rows, 12 // columns, columns)
    sums = tiles.sum((1, 3))  # NaN where inf and -inf meet, which goes with the lowest
    kept = keep.view(tiles.shape).any(3).any(1)
    assert torch.equal(kept, without_lowest(sums, pruned_count(sparsity, sums.numel())))


def test_a_tile_with_a_nan_goes_first():
    score = torch.full((4, 4), 1.0)
    score[3, 2] = math.nan
    keep = Tiles("block:2x2", 2, 2).keep(score, 0.25)
    assert not keep[2:, 2:].any()
    assert keep.sum() == 12


@pytest.mark.parametrize(
    ("text", "outputs", "inputs", "fits"),
    [
        ("block:2x3", 8, 12, True),
        ("block:2x3", 9, 12, False),
        ("block:2x3", 8, 10, False),
        ("row", 7, 11, True),
        ("column", 7, 11, True),
    ],
)
def test_tiles_fit_where_they_divide(text, outputs, inputs, fits):
    assert (parse(text).misfit(outputs, inputs) is None) == fits


def test_a_misfit_of_tiles_says_both_sides():
    assert parse("block:2x3").misfit(9, 10) == (
        "block:2x3 needs outputs and inputs that are multiples of 2 and 3, this layer has 9 and 10"
    )


def test_tiles_that_are_kept_in_part_are_counted():
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[0, 0] = keep[3, 5] = False
    keep[:2, 3:] = False
    assert parse("block:2x3").violations(keep) == 2
    assert parse("row").violations(keep) == 3
    assert parse("column").violations(keep) == 4
    assert parse("unstructured").violations(keep) == 0


# Spellings


@pytest.mark.parametrize(
    "text", ["unstructured", "2:4", "4:8", "16:32", "block:16x4", "row", "column"]
)
def test_a_pattern_is_named_as_it_is_spelled(text):
    assert parse(text).name == text


@scopes
def test_the_scope_reaches_unstructured(scope):
    assert parse("unstructured", scope).scope == scope


@pytest.mark.parametrize("text", ["0:4", "4:2", "4:4", "0:0", "3:65"])
def test_n_and_m_that_make_no_sense_are_refused(text):
    with pytest.raises(ConfigError, match=f'pattern "{text}": n:m keeps n of every m'):
        parse(text)


@pytest.mark.parametrize("text", ["block:0x4", "block:4x0", "block:0x0"])
def test_empty_blocks_are_refused(text):
    with pytest.raises(ConfigError, match=f'pattern "{text}": a block has at least one row'):
        parse(text)


@pytest.mark.parametrize(
    "text", ["nonsense", "", "2:", ":4", "2:4:8", "-2:4", "2.0:4", "block:4", "rows", " 2:4"]
)
def test_what_is_no_pattern_is_refused_with_the_choice(text):
    with pytest.raises(ConfigError) as refused:
        parse(text)
    assert str(refused.value).startswith(f'"{text}" is not a pattern. Choose: ')
    assert all(spelling in str(refused.value) for spelling in spellings())
