"""What every method promises, and what each one is."""

from itertools import pairwise

import prunekit_kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from prunekit.errors import NumericsError
from prunekit.methods import Scored, methods
from prunekit.methods.admm import Admm, Projection
from prunekit.methods.alps import Alps, Penalties
from prunekit.methods.layer import Layer, Pruned
from prunekit.methods.magnitude import Magnitude
from prunekit.methods.random import Random
from prunekit.methods.refine import refine
from prunekit.methods.ria import Ria
from prunekit.methods.sparsegpt import SparseGPT
from prunekit.methods.wanda import Wanda
from prunekit.patterns import parse, pruned_count
from prunekit.patterns.n_of_m import NOfM
from prunekit.patterns.tiles import Tiles
from prunekit.patterns.unstructured import Unstructured
from prunekit.statistics import ColumnEnergy, Gram, StageStatistics

OUTPUTS, INPUTS = 12, 144  # more than one block of 128 columns, and the last one is ragged
PATTERNS = [
    *(Unstructured(scope) for scope in ("row", "layer", "block")),
    *map(parse, ["2:4", "4:8", "1:3", "15:16", "block:4x8", "block:3x9", "row", "column"]),
]
law = settings(deadline=None, max_examples=15)
seeds = st.integers(0, 1 << 30)
every_method = pytest.mark.parametrize(
    "method", [kind() for kind in methods().values()], ids=lambda method: method.name
)
every_pattern = pytest.mark.parametrize(
    "pattern", PATTERNS, ids=lambda pattern: f"{pattern.name} {getattr(pattern, 'scope', '')}"
)


def tokens(count=200, inputs=INPUTS, seed=0):
    """Return correlated activations with outliers, as those of language models are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs // 6 + 1, inputs, generator=generator)
    x = torch.randn(count, inputs // 6 + 1, generator=generator) @ mixing
    x += torch.randn(count, inputs, generator=generator)
    x[:, :: max(inputs // 5, 1)] *= 15
    return x


def weights(outputs=OUTPUTS, inputs=INPUTS, seed=1):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def layer(pattern="unstructured", sparsity=0.5, x=None, weight=None, name="layer"):
    """Return a layer with both statistics."""
    x = tokens() if x is None else x
    weight = weights(inputs=x.shape[1]) if weight is None else weight
    gathered = [kind(x.shape[1]) for kind in (Gram, ColumnEnergy)]
    for statistic in gathered:
        statistic.update(x)
    pattern = parse(pattern) if isinstance(pattern, str) else pattern
    return Layer(name, weight, StageStatistics(gathered), pattern, sparsity)


def expected_count(pattern, sparsity, shape):
    outputs, inputs = shape
    size = outputs * inputs
    if isinstance(pattern, NOfM):
        return size // pattern.m * (pattern.m - pattern.n)
    if isinstance(pattern, Tiles):
        tile = (pattern.rows or outputs) * (pattern.columns or inputs)
        return pruned_count(sparsity, size // tile) * tile
    if pattern.scope == "row":
        return outputs * pruned_count(sparsity, inputs)
    return pruned_count(sparsity, size)


def assert_sound(method, given, found):
    """Check what holds for every method, pattern and input."""
    assert found.keep.dtype == torch.bool
    assert found.keep.shape == found.weight.shape == given.weight.shape
    assert found.weight.isfinite().all()
    assert (found.weight[~found.keep] == 0).all()
    count = expected_count(given.pattern, given.sparsity, given.weight.shape)
    assert int((~found.keep).sum()) == count
    assert given.pattern.violations(found.keep) == 0
    if isinstance(method, Scored):
        assert torch.equal(found.weight[found.keep], given.weight[found.keep])


def error(given, found):
    change = (found.weight - given.weight).double()
    return float(((change @ given.stats[Gram].full.double()) * change).sum())


def test_the_methods_are_all_here():
    assert set(methods().values()) == {Admm, Alps, Magnitude, Random, Wanda, Ria, SparseGPT}


# Promises of all


@every_pattern
@every_method
@pytest.mark.parametrize("sparsity", [0.5, 0.77])
def test_every_method_prunes_exactly_what_every_pattern_asks(method, pattern, sparsity):
    given = layer(pattern, sparsity)
    before = given.weight.clone()
    found = method.prune(given)
    assert_sound(method, given, found)
    assert torch.equal(given.weight, before)


FREE = [pattern for pattern in PATTERNS if pattern.sparsity is None]


@every_method
@pytest.mark.parametrize("pattern", FREE, ids=lambda pattern: f"{pattern.name} {pattern.stride}")
def test_sparsity_zero_changes_nothing_and_one_leaves_nothing(method, pattern):
    x = tokens()
    x[:, 5] = 0
    dense = method.prune(layer(pattern, 0.0, x))
    assert dense.keep.all()
    assert torch.equal(dense.weight, weights())
    empty = method.prune(layer(pattern, 1.0, x))
    assert not empty.keep.any()
    assert not empty.weight.any()


@every_method
@every_pattern
def test_activations_that_are_all_zero_leave_the_count_exact(method, pattern):
    given = layer(pattern, x=torch.zeros(9, INPUTS))
    found = method.prune(given)
    assert_sound(method, given, found)
    assert torch.equal(found.weight, given.weight * found.keep)


@every_method
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_token_or_none_is_enough_to_go_on(method, pattern, count):
    given = layer(pattern, x=tokens(count))
    assert_sound(method, given, method.prune(given))


@every_method
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x8"])
def test_weights_that_are_all_equal_leave_exactly_half(method, pattern):
    for value in (0.0, 1.0, -3.0):
        given = layer(pattern, weight=torch.full((OUTPUTS, INPUTS), value))
        found = method.prune(given)
        assert_sound(method, given, found)
        assert found.keep.sum() == OUTPUTS * INPUTS // 2


@every_method
@law
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 60), st.floats(0, 1), seeds)
def test_any_shape_is_pruned_exactly(method, outputs, inputs, count, sparsity, seed):
    x, weight = tokens(count, inputs, seed), weights(outputs, inputs, seed)
    for scope in ("row", "layer", "block"):
        given = layer(Unstructured(scope), sparsity, x, weight)
        assert_sound(method, given, method.prune(given))


@every_method
def test_a_weight_that_is_a_view_is_pruned_as_its_copy_is(method):
    stored = weights().T.contiguous()
    view = method.prune(layer("2:4", weight=stored.T))
    assert torch.equal(view.weight, method.prune(layer("2:4")).weight)
    assert torch.equal(stored.T, weights())


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT()])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_rows_are_pruned_each_by_itself(method, pattern):
    order = torch.randperm(OUTPUTS, generator=torch.Generator().manual_seed(0))
    straight = method.prune(layer(pattern))
    permuted = method.prune(layer(pattern, weight=weights()[order]))
    assert torch.equal(permuted.keep, straight.keep[order])
    torch.testing.assert_close(permuted.weight, straight.weight[order])


@every_method
def test_nothing_but_what_is_declared_is_read(method):
    whole = layer("2:4")
    needed = StageStatistics(
        statistic for statistic in whole.stats if type(statistic) in method.needs
    )
    given = Layer(whole.name, whole.weight, needed, whole.pattern, whole.sparsity)
    assert torch.equal(method.prune(given).weight, method.prune(whole).weight)


@pytest.mark.parametrize("method", [Wanda(), Ria(), SparseGPT(), Admm(), Alps()])
def test_without_its_statistic_a_method_names_it(method):
    given = Layer("layer", weights(), StageStatistics([]), parse("2:4"), 0.5)
    with pytest.raises(KeyError, match="was not gathered; declare it in `needs`"):
        method.prune(given)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (SparseGPT, {"damping": -0.1}),
        (SparseGPT, {"damping": 1.1}),
        (Ria, {"activation_power": -1}),
        (Wanda, {"damping": 0.1}),
        (Admm, {"iterations": 0}),
        (Admm, {"first_penalty": 0}),
        (Alps, {"damping": -0.1}),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind, wrong):
    with pytest.raises(ValidationError):
        kind(**wrong)


def test_methods_compare_in_the_published_groups():
    scopes = {name: kind.scope for name, kind in methods().items()}
    assert scopes == {
        "admm": "layer",
        "alps": "layer",
        "magnitude": "layer",
        "random": "layer",
        "ria": "row",
        "sparsegpt": "block",
        "wanda": "row",
    }


# Magnitude and random


def test_magnitude_keeps_the_largest_and_needs_nothing():
    given = Layer("a", torch.tensor([[3.0, -1, 2, -4]]), StageStatistics([]), parse("2:4"), 0.5)
    assert Magnitude().prune(given).weight.tolist() == [[3, 0, 0, -4]]
    assert not Magnitude.needs


def test_random_is_drawn_from_the_seed_and_the_name_of_the_layer():
    def keep(seed=0, name="model.layers.0.q_proj"):
        return Random(random_seed=seed).prune(layer(name=name)).keep

    state = torch.get_rng_state()
    first = keep()
    assert torch.equal(keep(), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(keep(seed=1), first)
    assert not torch.equal(keep(name="model.layers.1.q_proj"), first)
    assert not Random.needs


# Wanda and RIA


def test_wanda_weighs_by_the_norm_of_the_input():
    given = layer("2:4", x=torch.tensor([[1.0, 10, 1, 1]]), weight=torch.tensor([[3.0, -1, 2, 1]]))
    assert Wanda().prune(given).weight.tolist() == [[3, -1, 0, 0]]


@every_pattern
def test_wanda_of_inputs_that_are_equally_loud_is_magnitude(pattern):
    given = layer(pattern, x=torch.ones(4, INPUTS))
    assert torch.equal(Wanda().prune(given).keep, Magnitude().prune(given).keep)


@pytest.mark.parametrize("method", [Wanda(), Ria()])
def test_seeing_every_token_twice_changes_no_mask(method):
    x = tokens()
    once, twice = (method.prune(layer("unstructured", x=part)) for part in (x, torch.cat([x, x])))
    assert torch.equal(once.keep, twice.keep)


@law
@given(seeds, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_ria_is_its_formula(seed, power):
    x, weight = tokens(50, 24, seed), weights(7, 24, seed)
    given = layer("unstructured", x=x, weight=weight)
    magnitude, norm = weight.double().abs(), x.double().norm(dim=0)
    relative = magnitude / magnitude.sum(0) + magnitude / magnitude.sum(1, keepdim=True)
    exact = relative * (norm / len(x) ** 0.5) ** power
    score = Ria(activation_power=power).score(given)
    torch.testing.assert_close(score.double(), exact, rtol=2e-5, atol=0)


def test_ria_by_default_takes_the_root_of_the_norm():
    assert Ria().activation_power == 0.5


def test_ria_gives_an_empty_row_or_column_no_score():
    weight = weights(6, 8)
    weight[2] = 0
    weight[:, 5] = 0
    score = Ria().score(layer("2:4", x=tokens(9, 8), weight=weight))
    assert score.isfinite().all()
    assert not score[2].any()
    assert not score[:, 5].any()


# SparseGPT


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "15:16", "block:4x8", "column"])
def test_updating_weights_beats_leaving_them_on_the_same_mask(pattern):
    given = layer(pattern, x=tokens(600))
    found = SparseGPT().prune(given)
    assert_sound(SparseGPT(), given, found)
    masked = Pruned(given.weight * found.keep, found.keep)
    assert error(given, found) < 0.9 * error(given, masked)


def test_whole_rows_that_go_leave_nothing_to_make_up_for():
    given = layer("row")
    found = SparseGPT().prune(given)
    assert torch.equal(found.weight, given.weight * found.keep)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_sparsegpt_errs_less_than_wanda_and_wanda_less_than_magnitude(pattern):
    given = layer(pattern, x=tokens(600))
    errors = [error(given, method.prune(given)) for method in (SparseGPT(), Wanda(), Magnitude())]
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[1] < 0.8 * errors[2]
    assert errors[2] < error(given, Random().prune(given))


@every_pattern
def test_sparsegpt_of_inputs_that_share_nothing_is_wanda(pattern):
    loud = torch.linspace(1, 3, INPUTS)
    given = layer(pattern, x=torch.diag(loud))
    found = SparseGPT(damping=0).prune(given)
    # Sums of squares order tiles in another way, and rows are chosen in windows of 128 columns.
    if not isinstance(pattern, Tiles) and getattr(pattern, "scope", None) != "row":
        assert torch.equal(found.keep, Wanda().prune(given).keep)
    torch.testing.assert_close(found.weight, given.weight * found.keep)


def test_a_single_weight_that_goes_is_made_up_for_as_well_as_can_be():
    given = layer("unstructured", 1 / 16, tokens(99, 16), weights(1, 16))
    found = SparseGPT(damping=0).prune(given)
    gone = int((~found.keep).nonzero()[0, 1])
    gram = given.stats[Gram].full.double()
    free = [i for i in range(16) if i > gone]  # columns before are done when this one goes
    best = given.weight[0].double().clone()
    best[gone] = 0
    best[free] += torch.linalg.solve(
        gram[free][:, free], gram[free, gone] * given.weight[0, gone].double()
    )
    torch.testing.assert_close(found.weight[0].double(), best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8", "block:4x8"])
def test_dead_inputs_go_first_and_leave_the_count_exact(pattern):
    x = tokens()
    dead = torch.zeros(INPUTS, dtype=torch.bool)
    dead[[3, 40, 41, 130]] = True
    x[:, dead] = 0
    given = layer(pattern, x=x)
    found = SparseGPT().prune(given)
    assert_sound(SparseGPT(), given, found)
    if pattern != "block:4x8":
        assert not found.keep[:, dead].any()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_dead_input_that_may_stay_keeps_its_weight(pattern):
    x = tokens(99, 16)
    x[:, 4:9] = 0
    given = layer(pattern, 0.125, x=x)
    found = SparseGPT().prune(given)
    assert_sound(SparseGPT(), given, found)
    stays = found.keep.clone()
    stays[:, :4] = stays[:, 9:] = False
    assert stays.any()
    assert torch.equal(found.weight[stays], given.weight[stays])


def test_the_damping_that_was_asked_for_is_recorded():
    assert SparseGPT().prune(layer("2:4")).facts == {"damping": 0.01}
    assert SparseGPT(damping=0.1).prune(layer("2:4")).facts == {"damping": 0.1}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("count", [1, 5])
def test_a_singular_gram_matrix_is_damped_further_and_that_is_recorded(pattern, count):
    given = layer(pattern, x=tokens(count))
    found = SparseGPT(damping=0).prune(given)
    assert_sound(SparseGPT(), given, found)
    assert 0 < found.facts["damping"] <= 1


def test_a_matrix_that_no_damping_saves_names_the_layer():
    given = layer("2:4", name="model.layers.3.down_proj")
    given.stats[Gram].total.neg_()
    with pytest.raises(NumericsError, match=r"model\.layers\.3\.down_proj: .*more calibration"):
        SparseGPT().prune(given)


def test_linears_of_a_stage_share_one_factor(monkeypatch):
    calls = []

    def counted(gram, damping, solve=prunekit_kernels.inverse_factor):
        calls.append(damping)
        return solve(gram, damping)

    monkeypatch.setattr(prunekit_kernels, "inverse_factor", counted)
    first = layer("2:4")
    second = Layer("other", weights(seed=2), first.stats, first.pattern, first.sparsity)
    for method in (SparseGPT(), SparseGPT(), SparseGPT(damping=0.1)):
        method.prune(first)
        method.prune(second)
    assert calls == [0.01, 0.1]


@pytest.mark.parametrize(
    ("pattern", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8), ("unstructured", 0, 1), ("column", 0, 1)]
)
def test_the_sweep_is_the_operation_and_n_of_m_is_chosen_in_it(pattern, n, m):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.prunekit.obs_block.default:
                calls.append(args[4:])
            return func(*args, **(kwargs or {}))

    calls = []
    with Seen():
        SparseGPT().prune(layer(pattern))
    assert calls == [(0, 128, n, m), (128, 144, n, m)]


def test_sparsegpt_leaves_its_statistics_alone():
    given = layer("2:4")
    before = given.stats[Gram].full.clone()
    SparseGPT().prune(given)
    assert torch.equal(given.stats[Gram].full, before)


# ADMM and ALPS

SOLVERS = [Admm(), Alps()]
every_solver = pytest.mark.parametrize("method", SOLVERS, ids=lambda method: method.name)


@every_solver
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8", "block:4x8"])
def test_searching_for_the_mask_beats_sparsegpt_even_when_refined(method, pattern):
    given = layer(pattern, x=tokens(50000))
    swept = SparseGPT(damping=0.001).prune(given)
    found = error(given, method.prune(given))
    assert found < 0.98 * error(given, refine(given, swept))
    assert found < 0.8 * error(given, swept)


@every_solver
def test_the_iterations_find_what_float64_finds(method, monkeypatch):
    given = layer("2:4", x=tokens(2000))
    found = method.prune(given)
    gram = Gram(INPUTS)
    gram.tokens, gram.total = 2000, given.stats[Gram].full.double()
    weight = given.weight.double()
    exact = method.prune(Layer("exact", weight, StageStatistics([gram]), given.pattern, 0.5))
    assert exact.weight.dtype == torch.float64
    assert (found.keep == exact.keep).float().mean() > 0.99
    assert error(given, found) == pytest.approx(error(given, exact), rel=0.01)


def test_the_penalty_rises_from_the_first_to_the_last_in_seven_stages():
    rise = Admm(iterations=28, first_penalty=0.1, last_penalty=2)._rise()
    assert len(rise) == 28
    assert rise[0] == rise[3] == 0.1
    assert rise[24] == rise[27] == pytest.approx(2)
    assert [b / a for a, b in pairwise(rise[::4])] == pytest.approx([20 ** (1 / 6)] * 6)
    assert Admm(iterations=2)._rise() == pytest.approx([0.15, 1])
    assert Admm(iterations=1)._rise() == [0.15]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_layers_that_read_the_same_are_solved_together_as_each_by_itself(pattern, monkeypatch):
    shared = layer(pattern, x=tokens(2000))
    layers = [
        Layer(f"layer {seed}", weights(8 * seed, seed=seed), shared.stats, shared.pattern, density)
        for seed, density in ((1, 0.5), (2, 0.7), (3, 0.6))
    ]
    calls, invert = [], torch.cholesky_inverse
    monkeypatch.setattr(
        torch, "cholesky_inverse", lambda *a, **k: calls.append(1) or invert(*a, **k)
    )
    together = Admm().prune_together(layers)
    assert len(calls) == 7
    for each, found in zip(layers, together, strict=True):
        alone = Admm().prune(each)
        assert torch.equal(found.keep, alone.keep)
        torch.testing.assert_close(found.weight, alone.weight)


def test_more_iterations_err_no_more():
    given = layer("2:4", x=tokens(2000))
    few, many = (error(given, Admm(iterations=n).prune(given)) for n in (5, 60))
    assert many < few


def test_the_penalty_of_alps_follows_how_much_the_mask_changes():
    keep = torch.arange(1000).view(1, -1) < 500
    project = Projection([], [prunekit_kernels.pack(keep)])
    found = Penalties(Alps(), layer(), project)
    penalties = iter(found)
    shifts = [100, 4, 1]  # of 500 that stay, twice so many change: 40 %, 1.6 %, 0.4 %
    seen = []
    for shift in shifts:
        seen.append([next(penalties) for _ in range(3)])
        keep = keep.roll(shift, 1)
        project.bits = [prunekit_kernels.pack(keep)]
    seen.append([next(penalties)])
    assert found.ahead(seen[-1][0], 3) == pytest.approx([0.1716, 0.1716 * 1.1, 0.1716 * 1.21])
    assert [steps[0] for steps in seen] == pytest.approx([0.1, 0.13, 0.156, 0.1716])
    assert all(len(set(steps)) == 1 for steps in seen)


def test_alps_looks_no_further_ahead_than_its_last_step():
    found = Penalties(Alps(most_iterations=4), layer(), Projection([], []))
    assert found.ahead(0.1, 8) == [0.1, 0.1 * 1.3]


def test_alps_ends_when_the_mask_has_settled():
    project = Projection([], [torch.full((2, 1), 255, dtype=torch.uint8)])
    assert list(Penalties(Alps(), layer(), project)) == [0.1] * 3


@every_solver
def test_what_is_no_gram_matrix_names_the_layer(method):
    given = layer("2:4", name="model.layers.3.down_proj")
    given.stats[Gram].total.neg_()
    with pytest.raises(NumericsError, match=r"model\.layers\.3\.down_proj: .*more calibration"):
        method.prune(given)


@every_solver
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_solvers_let_dead_inputs_go_first_and_keep_those_that_may_stay(method, pattern):
    x = tokens()
    dead = torch.zeros(INPUTS, dtype=torch.bool)
    dead[[3, 40, 41, 130]] = True
    x[:, dead] = 0
    assert not method.prune(layer(pattern, x=x)).keep[:, dead].any()
    x[:, 100:] = 0
    given = layer("unstructured", 0.1, x=x)
    found = method.prune(given)
    stays = found.keep & (x == 0).all(0)
    assert stays.any()
    assert torch.equal(found.weight[stays], given.weight[stays])


@every_pattern
def test_sparsegpt_lets_zeros_stay_zero_if_asked(pattern):
    weight = weights()
    weight[:, ::3] = 0
    given = layer(pattern, 0.25, weight=weight)
    found = SparseGPT(keep_zeros=True).prune(given)
    assert not found.weight[:, ::3].any()
    assert not found.keep[:, ::3].any()
    assert (found.weight[~found.keep] == 0).all()


def test_unless_asked_zeros_make_up_for_others():
    weight = weights()
    weight[:, 64:72] = 0
    given = layer("2:4", weight=weight)
    assert SparseGPT().prune(given).weight[:, 64:72].any()
    assert not SparseGPT(keep_zeros=True).prune(given).weight[:, 64:72].any()


def test_zeros_that_stay_are_part_of_what_is_asked():
    weight = weights()
    weight[:, ::4] = weight[:, 1::4] = 0
    found = SparseGPT(keep_zeros=True).prune(layer("2:4", weight=weight))
    assert torch.equal(found.keep, weight != 0)
    swept = SparseGPT(keep_zeros=True).prune(layer("unstructured", 0.5, weight=weight))
    assert torch.equal(swept.keep, weight != 0)


@every_pattern
@pytest.mark.parametrize("keep_zeros", [False, True])
def test_sparsegpt_in_order_of_energy_is_the_sweep_of_a_permuted_layer(pattern, keep_zeros):
    together = getattr(pattern, "m", 1)
    x, weight = tokens(600), weights()
    weight[:, :4] = 0
    found = SparseGPT(order="energy", keep_zeros=keep_zeros).prune(
        layer(pattern, x=x, weight=weight)
    )
    assert found.weight.isfinite().all()
    assert keep_zeros or pattern.violations(found.keep) == 0
    if isinstance(pattern, Tiles):
        return  # chosen where the tiles are, so that the layer cannot be permuted
    energy = x.square().sum(0).view(-1, together).sum(1)
    columns = torch.arange(INPUTS).view(-1, together)
    order = columns[energy.argsort(descending=True, stable=True)].flatten()
    given = layer(pattern, x=x[:, order], weight=weight[:, order])
    expected = SparseGPT(keep_zeros=keep_zeros).prune(given)
    assert torch.equal(found.keep[:, order], expected.keep)
    torch.testing.assert_close(found.weight[:, order], expected.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", ["row", "column", "block:4x8"])
def test_in_order_of_energy_tiles_are_those_of_the_layer_as_it_stands(pattern):
    given = layer(pattern, x=torch.diag(torch.linspace(1, 3, INPUTS)))
    straight, ordered = (SparseGPT(order=order).prune(given) for order in ("given", "energy"))
    assert torch.equal(ordered.keep, straight.keep)
    torch.testing.assert_close(ordered.weight, straight.weight)


def test_in_order_of_energy_dead_inputs_still_go_first():
    x = tokens()
    x[:, [3, 40, 41, 130]] = 0
    found = SparseGPT(order="energy").prune(layer("2:4", x=x))
    assert not found.keep[:, [3, 40, 41, 130]].any()
    assert found.keep.sum() == OUTPUTS * INPUTS // 2
