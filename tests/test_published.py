"""Masks and weights equal those of the published algorithms.

The reference files are written by ``tests/published/freeze.py``.
"""

import pytest
import torch
from safetensors.torch import load_file

from prunekit.methods.layer import Layer
from prunekit.methods.sparsegpt import SparseGPT
from prunekit.methods.wanda import Wanda
from prunekit.patterns import parse
from prunekit.statistics import ColumnEnergy, Gram, StageStatistics
from tests.published import freeze


def frozen(name):
    return load_file(freeze.FOLDER / f"{name}.safetensors")


@pytest.fixture(scope="module")
def given():
    return frozen("inputs")


@pytest.fixture(scope="module")
def sparsegpt():
    return frozen("sparsegpt")


def layer(given, kind, pattern, sparsity=0.5):
    statistic = kind(given["weight"].shape[1])
    for tokens in given["tokens"].float().split(100):
        statistic.update(tokens)
    return Layer("layer", given["weight"], StageStatistics([statistic]), pattern, sparsity)


def test_the_gram_matrix_is_exactly_the_published_one(given):
    tokens = given["tokens"].double()
    gram = layer(given, Gram, parse("2:4")).stats[Gram].full
    assert torch.equal(gram.double(), tokens.T @ tokens)


@pytest.mark.parametrize("kind", [ColumnEnergy, Gram])
@pytest.mark.parametrize("case", ["0.5", "0.6", "2:4", "4:8"])
def test_wanda_keeps_what_the_published_wanda_keeps(given, case, kind):
    pattern, sparsity = (parse(case), 0.5) if ":" in case else (parse("unstructured"), float(case))
    found = Wanda().prune(layer(given, kind, pattern, sparsity))
    assert torch.equal(found.keep, frozen("wanda")[f"keep_{case}"])
    assert torch.equal(found.weight, given["weight"] * found.keep)


@pytest.mark.parametrize("case", ["0.5", "2:4"])
def test_sparsegpt_keeps_what_the_published_sparsegpt_keeps(given, sparsegpt, case):
    pattern = parse("2:4") if case == "2:4" else parse("unstructured", SparseGPT.scope)
    found = SparseGPT().prune(layer(given, Gram, pattern))
    assert torch.equal(found.keep, sparsegpt[f"keep_{case}"])
    assert found.facts == {"damping": 0.01}
    published = sparsegpt[f"weight_{case}"]
    error = (found.weight.double() - published).norm() / published.norm()
    assert error <= 1e-5
    assert (found.weight - published).abs().max() <= 1e-5 * published.abs().max()


def test_of_each_block_sparsegpt_prunes_k_where_the_authors_program_prunes_one_more(
    given, sparsegpt
):
    programmed = sparsegpt["first_block_as_programmed"]
    found = SparseGPT().prune(layer(given, Gram, parse("unstructured", "block")))
    ours = found.keep[:, : freeze.BLOCK]
    assert int((~ours).sum()) == ours.numel() // 2
    assert int((~programmed).sum()) == ours.numel() // 2 + 1
    assert int((ours != programmed).sum()) == 1


def test_of_equal_weights_sparsegpt_prunes_half_where_the_authors_program_prunes_all():
    equal = {"tokens": torch.eye(8), "weight": torch.ones(4, 8)}
    found = SparseGPT().prune(layer(equal, Gram, parse("unstructured", "block")))
    assert found.keep.sum() == 16
    programmed = freeze.half_of_block_as_programmed(torch.ones(4, 8))
    assert not programmed.any()


def test_of_equal_weights_wanda_keeps_the_lower_index_where_the_authors_program_keeps_the_higher():
    equal = {"tokens": torch.ones(3, 8), "weight": torch.ones(2, 8)}
    score = torch.ones(2, 8)
    program = torch.ones_like(score, dtype=torch.bool)
    program.scatter_(1, score.sort(dim=1, stable=True).indices[:, :4], False)  # noqa: FBT003
    found = Wanda().prune(layer(equal, ColumnEnergy, parse("unstructured")))
    assert torch.equal(found.keep, ~program)
    assert found.keep[:, :4].all()


def test_the_frozen_files_are_what_the_script_writes(given, sparsegpt):
    wanda = freeze.wanda(**given)
    assert all(torch.equal(wanda[name], mask) for name, mask in frozen("wanda").items())
    for name, tensor in freeze.sparsegpt(**given).items():
        torch.testing.assert_close(sparsegpt[name], tensor, rtol=1e-10, atol=1e-10)
