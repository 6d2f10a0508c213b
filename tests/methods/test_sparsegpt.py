"""SparseGPT: errors, dead inputs, damping, column order."""

import prunekit_kernels
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prunekit.errors import NumericsError
from prunekit.methods.layer import Layer, Pruned
from prunekit.methods.magnitude import Magnitude
from prunekit.methods.random import Random
from prunekit.methods.sparsegpt import SparseGPT
from prunekit.methods.wanda import Wanda
from prunekit.patterns.tiles import Tiles
from prunekit.statistics import Gram
from tests.support.methods import (
    INPUTS,
    OUTPUTS,
    assert_sound,
    error,
    every_pattern,
    layer,
    tokens,
    weights,
)


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
                calls.append(args[6:])
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
