"""How good the search for masks is: beside exact OBC, and on every layer of a real model."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunekit.allocations.owl import Owl
from prunekit.architectures import find
from prunekit.methods.admm import Admm
from prunekit.methods.layer import Layer
from prunekit.methods.refine import refine
from prunekit.methods.sparsegpt import SparseGPT
from prunekit.models.layout import Selection, layout, runners
from prunekit.models.sequential.pipeline import batches, iterate_blocks
from prunekit.patterns import parse
from prunekit.sparsify.calibrate import survey
from prunekit.sparsify.error import relative_error
from prunekit.statistics import Gram, StageStatistics
from tests.kernels.layers import correlated, loss


def related(mean, tokens=4096, inputs=96, noise=0.15):
    """Return a weight and correlated inputs with a mean of so many times what each varies by."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x = draw(tokens, inputs) * torch.arange(1, inputs + 1) ** -0.5 * inputs**0.5 / 2
    basis = torch.linalg.qr(draw(inputs, inputs)).Q
    return draw(64, inputs), x @ basis + noise * draw(tokens, inputs) + mean * draw(1, inputs)


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


def read_by(name, weight, x, pattern, sparsity):
    """Return a layer with the Gram matrix of its inputs."""
    stats = Gram(len(x.T))
    stats.update(x)
    return Layer(name, weight, StageStatistics([stats]), pattern, sparsity)


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
def test_admm_errs_less_than_refined_sparsegpt_on_every_layer_of_a_model(
    shared, pattern, sparsities
):
    folder = shared / "models/stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = (shared / "data/tinystories/train.txt").read_text()[:60_000]
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    ids = ids[: len(ids) // 256 * 256].view(-1, 256)
    stacks = runners(model, find(model))
    given = parse(pattern, "layer")
    blocks = layout(stacks, Selection(given))

    def visits():
        return zip(
            iterate_blocks(model, stacks, None, batches(ids, model.device)), blocks, strict=True
        )

    names = set()
    for layers in survey(visits, Grams(), given)():
        for layer in layers:
            names.add(layer.name)
            for sparsity in sparsities:
                ours, swept = (
                    relative_error(layer.weight, found.weight, layer.stats)
                    for found in both(layer, given, sparsity)
                )
                assert ours < swept, f"{layer.name} at {sparsity}"
    assert len(names) == 35


def both(layer, pattern, sparsity):
    """Return a layer pruned by ADMM, and by SparseGPT in each scope that it is used with."""
    given = Layer(layer.name, layer.weight, layer.stats, pattern, sparsity)
    windows = pattern if pattern.sparsity else parse("unstructured", "block")
    swept = Layer(layer.name, layer.weight, layer.stats, windows, sparsity)
    return Admm().prune(given), refine(swept, SparseGPT().prune(swept))
