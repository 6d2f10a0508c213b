import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prunekit_kernels import Groups, _select_radix, choose
from prunekit_kernels._triton import INTERPRETED
from prunekit_kernels.selection import _choose, choose_reference

from tests.kernels.cases import cases
from tests.kernels.selections import EASY, GROUPS, INPUTS, KINDS, OUTPUTS, PATHS, hard_scores

COMBINED = cases(KINDS, GROUPS, seldom=lambda kind, name: kind not in EASY and name not in PATHS)


# NumPy, by which kernels are interpreted, warns of inf − inf.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("kind", "name"), COMBINED)
def test_chooses_what_sorting_chooses(kind, name, device):
    score = hard_scores(kind, (OUTPUTS, INPUTS), device)
    before = score.clone()
    assert torch.equal(choose(score, GROUPS[name]), choose_reference(score, GROUPS[name]))
    assert torch.equal(score.nan_to_num(nan=9), before.nan_to_num(nan=9))


@pytest.mark.skipif(not INTERPRETED, reason="the emulator belongs to the interpreter")
@pytest.mark.parametrize("name", ["layer", "windows", "ragged windows"])
@pytest.mark.parametrize("kind", EASY)
def test_counts_in_shared_memory_are_the_same(kind, name, monkeypatch):
    from tests.kernels import ptx

    ptx.install(monkeypatch)
    monkeypatch.setattr(_select_radix, "runs_ptx", lambda: True)
    score = hard_scores(kind, (OUTPUTS, INPUTS), "cpu")
    assert torch.equal(choose(score, GROUPS[name]), choose_reference(score, GROUPS[name]))


@pytest.mark.parametrize("pruned", [1, 5000, 9999, 12345, 19999])
@pytest.mark.parametrize("shape", [(50, 400), (1, 20000), (20000, 1), (4, 5000)], ids=str)
def test_ties_are_split_among_programs(shape, pruned, device):
    score = torch.randint(0, 2, shape, device=device).float()
    groups = Groups(None, None, (pruned,))
    assert torch.equal(choose(score, groups), choose_reference(score, groups))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pruned", [100, 1700, 3900])
def test_narrow_scores_of_both_signs(pruned, dtype, device):
    score = torch.randn(40, 100, device=device).to(dtype)
    groups = Groups(None, None, (pruned,))
    assert torch.equal(choose(score, groups), choose_reference(score, groups))


def test_rows_longer_than_a_program_holds(device):
    score = hard_scores("equal", (2, 32800), device)
    groups = Groups(1, None, (20000,))
    assert torch.equal(choose(score, groups), choose_reference(score, groups))


@pytest.mark.parametrize("m", [2, 3, 6, 8, 16, 31, 32])
def test_any_number_of_neighbours(m, device):
    score = hard_scores("equal", (2, 18 * m), device)
    groups = Groups(1, m, (m // 2,))
    assert torch.equal(choose(score, groups), choose_reference(score, groups))


@pytest.mark.parametrize("strides", ["transposed", "every other", "offset"])
@pytest.mark.parametrize(
    "groups", [Groups(1, None, (9,)), Groups(None, None, (59,)), Groups(1, 4, (2,))], ids=str
)
def test_any_strides(strides, groups, device):
    x = torch.randn(24, 24, device=device)
    x = {"transposed": x.T, "every other": x[::2, ::2], "offset": x[9:, 4:]}[strides]
    assert torch.equal(choose(x, groups), choose_reference(x, groups))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["row", "layer", "2:4"])
def test_any_float_type(name, dtype, device):
    score = hard_scores("normal", (OUTPUTS, INPUTS), device).to(dtype)
    assert torch.equal(choose(score, GROUPS[name]), choose_reference(score, GROUPS[name]))


@settings(deadline=None, max_examples=8 if INTERPRETED else 15)
@given(st.integers(1, 6), st.integers(1, 40), st.data())
def test_counts_are_exact(outputs, inputs, data):
    rows = data.draw(st.sampled_from([1, None]))
    size = inputs if rows else inputs * outputs
    pruned = data.draw(st.integers(0, size))
    score = torch.randint(0, 4, (outputs, inputs)).float()
    gone = ~choose(score, Groups(rows, None, (pruned,)))
    assert gone.sum() == (pruned * outputs if rows else pruned)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("rows", [1, None])
def test_of_nothing_nothing_is_chosen(rows, shape, device):
    assert choose(torch.zeros(shape, device=device), Groups(rows, None, (0,))).shape == shape


def test_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="neighbours have to divide it"):
        choose(torch.ones(4, 8), Groups(1, 3, (1,)))


@pytest.mark.parametrize(
    ("tile", "shape"),
    [((1, 1100), (7, 1100)), ((130, 1), (130, 40)), ((2, 3), (12, 33)), ((9, 520), (9, 1040))],
    ids=str,
)
def test_tiles_of_any_size(tile, shape, device):
    score = hard_scores("equal", shape, device)
    count = score.numel() // (tile[0] * tile[1])
    groups = Groups(None, None, (count - count // 3,), tile)
    assert torch.equal(choose(score, groups), choose_reference(score, groups))


@pytest.mark.parametrize(
    ("value", "more"), [(1.0, 2e-7), (3e38, 1e32), (1e-38, 1e-44), (-3e38, 1e32)], ids=str
)
def test_sums_of_tiles_are_not_rounded(value, more, device):
    # In float32 four such scores overflow, or their sums do not differ.
    score = torch.full((4, 64), value, device=device)
    best = [5, 9, 2, 14]
    for row, tile in enumerate(best):
        score[row, 4 * tile] += more
    keep = choose(score, Groups(None, None, (60,), (1, 4)))
    assert [row.nonzero()[0].item() // 4 for row in keep] == best
    assert keep.sum() == 16


def test_sums_of_float64_are_as_exact():
    score = torch.ones(2, 8, dtype=torch.float64)
    score[1, 3] += 1e-12
    keep = choose(score, Groups(None, None, (3,), (1, 4)))
    assert keep.sum(1).tolist() == [0, 4]


@pytest.mark.parametrize("name", cases(PATHS, seldom=lambda name: name != "2:4"))
def test_is_a_proper_op(name, device):
    score = hard_scores("normal", (OUTPUTS, INPUTS), device)
    torch.library.opcheck(_choose, (score, GROUPS[name].numbers()))


@pytest.mark.parametrize("name", PATHS)
def test_compiles_without_graph_break(name, device):
    torch._dynamo.reset()  # one program for each group would be too many for one function
    score = hard_scores("equal", (INPUTS, OUTPUTS), device).T
    found = torch.compile(choose, backend="aot_eager", fullgraph=True)(score, GROUPS[name])
    assert torch.equal(found, choose_reference(score, GROUPS[name]))


@pytest.mark.gpu
@pytest.mark.parametrize("inputs", [4096, 11008, 28672])
def test_real_sizes(inputs, device):
    score = torch.randn(512, inputs, device=device).abs()
    every = torch.zeros(-(-inputs // 128), dtype=torch.int64) + 512 * 64
    for groups in (
        Groups(1, None, (inputs // 2,)),
        Groups(None, None, (256 * inputs,)),
        Groups(None, 128, tuple(every.tolist())),
        Groups(1, 4, (2,)),
        Groups(1, 32, (16,)),
    ):
        assert torch.equal(choose(score, groups), choose_reference(score, groups))
