"""ADMM and ALPS: errors against SparseGPT, exact OBC and float64; dead inputs."""

from dataclasses import replace
from itertools import pairwise

import prunekit_kernels
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunekit.allocations.owl import Owl
from prunekit.architectures import find_architecture
from prunekit.errors import NumericsError
from prunekit.methods import admm, base
from prunekit.methods.admm import Admm
from prunekit.methods.alps import Alps
from prunekit.methods.layer import Layer
from prunekit.methods.refine import refine
from prunekit.methods.sparsegpt import SparseGPT
from prunekit.models.layout import LinearSelection, list_blocks, stack_runners
from prunekit.models.sequential.pipeline import iterate_blocks, split_batches
from prunekit.patterns import parse
from prunekit.sparsify.calibrate import make_survey
from prunekit.sparsify.error import relative_error
from prunekit.statistics import Gram, StageStatistics
from tests.kernels.layers import correlated, loss
from tests.support.methods import INPUTS, error, layer, tokens, weights

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
    rise = Admm(iterations=28, first_penalty=0.1, last_penalty=2)._penalties()
    assert len(rise) == 28
    assert rise[0] == rise[3] == 0.1
    assert rise[24] == rise[27] == pytest.approx(2)
    assert [b / a for a, b in pairwise(rise[::4])] == pytest.approx([20 ** (1 / 6)] * 6)
    assert Admm(iterations=2)._penalties() == pytest.approx([0.15, 1])
    assert Admm(iterations=1)._penalties() == [0.15]


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


def related(mean, tokens=4096, inputs=96, noise=0.15):
    """Return a weight and correlated inputs with a mean of so many times what each varies by."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x = draw(tokens, inputs) * torch.arange(1, inputs + 1) ** -0.5 * inputs**0.5 / 2
    basis = torch.linalg.qr(draw(inputs, inputs)).Q
    return draw(64, inputs), x @ basis + noise * draw(tokens, inputs) + mean * draw(1, inputs)


def read_by(name, weight, x, pattern, sparsity):
    """Return a layer with the Gram matrix of its inputs."""
    stats = Gram(len(x.T))
    stats.update(x)
    return Layer(name, weight, StageStatistics([stats]), pattern, sparsity)


def both(layer, pattern, sparsity):
    """Return a layer pruned by ADMM, and by SparseGPT in each scope that it is used with."""
    given = Layer(layer.name, layer.weight, layer.stats, pattern, sparsity)
    windows = pattern if pattern.sparsity else parse("unstructured", "block")
    swept = Layer(layer.name, layer.weight, layer.stats, windows, sparsity)
    return Admm().prune(given), refine(swept, SparseGPT().prune(swept))


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.3), ("2:4", 0.5)])
def test_admm_errs_less_than_refined_sparsegpt_where_inputs_share_a_large_mean(pattern, sparsity):
    weight, x = related(mean=3)
    given = read_by("layer", weight, x, parse(pattern, "layer"), sparsity)
    ours, swept = (
        relative_error(weight, found.weight, given.stats)
        for found in both(given, given.pattern, sparsity)
    )
    assert ours < 0.95 * swept


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.6), ("2:4", 0.5)])
@pytest.mark.parametrize("tokens", [48, 96, 384])
def test_admm_errs_less_on_tokens_not_seen_however_few_were(tokens, pattern, sparsity):
    weight, x = related(mean=0, tokens=4096 + tokens)
    given = read_by("layer", weight, x[:tokens], parse(pattern, "layer"), sparsity)
    unseen = read_by("layer", weight, x[tokens:], given.pattern, sparsity)
    swept = SparseGPT().prune(replace(given, pattern=parse(pattern, "block")))
    ours, theirs = (
        relative_error(weight, found.weight, unseen.stats) for found in (Admm().prune(given), swept)
    )
    assert ours < 0.85 * theirs


class Grams(Owl):
    """Surveys the Gram matrices of the dense model."""

    needs = frozenset({Gram})


def obc(weight, gram, count):
    """Prune ``count`` weights of each row, always the one that costs least, exactly (float64).

    Frantar & Alistarh, Optimal Brain Compression, arXiv:2208.11580, Algorithm 1: every removal
    moves the rest of the row to its new best, and takes the weight out of the inverse.
    """
    weight, each = weight.clone(), torch.arange(len(weight))
    inverse = torch.linalg.inv(gram).repeat(len(weight), 1, 1)
    gone = torch.zeros_like(weight, dtype=torch.bool)
    for _ in range(count):
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        worst = (weight.square() / diagonal).masked_fill_(gone, torch.inf).argmin(1)
        column = inverse[each, worst]
        pivot = column[each, worst, None]
        weight -= weight[each, worst, None] / pivot * column
        inverse.baddbmm_(column[:, :, None], (column / pivot)[:, None], alpha=-1)
        gone[each, worst] = True
        weight[gone] = 0
        # Out of reach of rounding: what is gone takes no part.
        inverse[each, worst] = 0
        inverse[each, :, worst] = 0
        inverse[each, worst, worst] = 1
    return weight


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_admm_errs_at_most_a_hundredth_more_than_exact_obc(sparsity):
    weight, gram = correlated(8, 512)
    gram += 0.001 * gram.diagonal().mean() * torch.eye(512, dtype=gram.dtype)
    exact = loss(obc(weight, gram, int(sparsity * 512)), weight, gram)
    statistic = Gram(512)
    statistic.total = gram.float()
    pattern = parse("unstructured", "row")
    given = Layer("layer", weight.float(), StageStatistics([statistic]), pattern, sparsity)
    found = Admm(damping=0).prune(given)
    swept = refine(given, SparseGPT(damping=0.001).prune(given))
    assert loss(found.weight, weight, gram) <= 1.01 * exact
    assert loss(swept.weight, weight, gram) > 1.05 * exact


@pytest.mark.parametrize(("pattern", "sparsities"), [("unstructured", (0.5, 0.8)), ("2:4", (0.5,))])
@pytest.mark.parametrize(
    "every", [pytest.param(1, marks=pytest.mark.soak), pytest.param(4, id="a linear of each kind")]
)
def test_admm_errs_less_than_refined_sparsegpt_on_every_layer_of_a_model(
    shared, pattern, sparsities, every
):
    folder = shared / "models/stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = (shared / "data/tinystories/train.txt").read_text()[: 60_000 // every]
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    ids = ids[: len(ids) // 256 * 256].view(-1, 256)
    stacks = stack_runners(model, find_architecture(model))
    given = parse(pattern, "layer")
    blocks = list_blocks(stacks, LinearSelection(given))

    def visits():
        return zip(
            iterate_blocks(model, stacks, None, split_batches(ids, model.device)),
            blocks,
            strict=True,
        )

    names = []
    for layers in make_survey(visits, Grams(), given)():
        for each in layers:
            names.append(each.name)
            for sparsity in sparsities if len(names) % every == 0 else ():
                ours, swept = (
                    relative_error(each.weight, found.weight, each.stats)
                    for found in both(each, given, sparsity)
                )
                assert ours < swept, f"{each.name} at {sparsity}"
    assert len({*names}) == len(names) == 35
    assert len({name.rpartition(".")[2] for name in names[every - 1 :: every]}) == 7


def test_wide_layers_share_the_inverses_of_their_stage(monkeypatch):
    first = layer("2:4", x=tokens(2000))
    second = replace(first, weight=weights().flip(0)[: len(first.weight) // 2])
    outputs = [first.outputs, second.outputs]
    apart = [Admm().prune(each) for each in (first, second)]
    for module in (base, admm):
        monkeypatch.setattr(module, "MAX_STACKED_ROWS", sum(outputs) - 1)
    calls, invert = [], prunekit_kernels.damped_inverse
    monkeypatch.setattr(
        prunekit_kernels, "damped_inverse", lambda *a: calls.append(a[2]) or invert(*a)
    )
    found = Admm().prune_together([first, second])
    assert len(calls) == len(set(calls)) == Admm().inverses(outputs) == admm.STAGES
    assert Admm().kept_squares(outputs) == admm.STAGES - 1
    assert Admm().kept_squares([sum(outputs)]) == Admm().kept_squares(outputs[:1]) == 0
    for one, other in zip(apart, found, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.keep, other.keep)
