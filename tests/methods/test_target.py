"""Reconstruction target: the layer's own outputs, or those of the dense model."""

import copy
import weakref

import pytest
import torch
from pydantic import ValidationError

import prunekit
from prunekit.architectures import find_architecture
from prunekit.config.prune_table import Prune
from prunekit.errors import ConfigError, NumericsError
from prunekit.methods import target
from prunekit.methods.admm import Admm
from prunekit.models.layout import LinearSelection, list_blocks, stack_runners
from prunekit.models.sequential.pipeline import BATCH_TOKENS, iterate_blocks, split_batches
from prunekit.sparsify.block_pruner import BlockPruner
from prunekit.sparsify.recipe import Recipe
from prunekit.statistics import CrossGram, Gram, StageStatistics
from tests.support.architectures import tiny
from tests.support.checkpoints import planned, write
from tests.support.methods import tokens, weights

pytestmark = pytest.mark.usefixtures("no_page")

MOST = {"pattern": "unstructured", "sparsity": 0.7, "target": "dense"}


@pytest.fixture
def ids():
    return torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 48)


def gathered(x, dense):
    gram, cross = Gram(x.shape[1]), CrossGram(x.shape[1])
    gram.update(x)
    cross.update_pair(x, dense)
    return StageStatistics([gram, cross])


@pytest.mark.parametrize("outputs", [12, 300])
@pytest.mark.parametrize("count", [20000, 2000])
def test_is_the_ridge_regression_of_the_dense_output(count, outputs):
    """With few tokens for the inputs there are the ridge is half an input a token.

    More outputs than inputs are reckoned in another order.
    """
    dense = tokens(count)
    x = dense + 0.3 * tokens(count, seed=4)
    weight = weights(outputs)
    assert (outputs > weight.shape[1]) == (outputs == 300)
    gram, cross = x.double().T @ x.double(), dense.double().T @ x.double()
    share = max(0.01, len(gram) / 2 / count)
    assert (share == 0.01) == (count == 20000)
    ridge = share * gram.diagonal().mean() * torch.eye(len(gram))
    best = torch.linalg.solve(gram + ridge, weight.double() @ (cross + ridge), left=False)
    wanted = (1 - target.SHARE) * weight + target.SHARE * best
    stats = gathered(x, dense)
    for rows in (weight, weight[:7]):  # linears of a stage, the widest first
        found = target.reconstruction_target(rows, stats, len(rows)).double()
        torch.testing.assert_close(found, wanted[: len(rows)], rtol=1e-3, atol=1e-3)


def test_what_the_dense_model_reads_is_not_what_it_gives(ids, monkeypatch):
    """Where the last stage reads the hidden states themselves, as without a norm before it."""
    found = []
    aim = target.reconstruction_target

    def look(weight, stats, outputs):
        found.append(float(stats[CrossGram].total.norm()))
        return aim(weight, stats, outputs)

    monkeypatch.setattr("prunekit.sparsify.block_pruner.reconstruction_target", look)
    skip = ["*output*", "*intermediate*"]
    prunekit.prune(tiny("bert"), ids, method="admm", sparsity=0.5, skip=skip)
    assert found[:3] == [0, 0, 0]
    assert all(found[3:])


@pytest.mark.parametrize("propagation", ["stage", "block"])
def test_nothing_of_the_cross_product_is_there_while_a_stage_is_pruned(
    propagation, ids, monkeypatch
):
    held, found = [], []
    aim, solve = target.reconstruction_target, Admm.prune_together

    def look(weight, stats, outputs):
        held.append(weakref.ref(stats[CrossGram]))
        return aim(weight, stats, outputs)

    def prune(method, layers):
        found.extend(cross() for cross in held)
        held.clear()
        return solve(method, layers)

    monkeypatch.setattr("prunekit.sparsify.block_pruner.reconstruction_target", look)
    monkeypatch.setattr(Admm, "prune_together", prune)
    settings = MOST | {"method": "admm", "propagation": propagation}
    prunekit.prune(tiny("llama"), ids, **settings)
    assert len(found) > 8
    assert not any(found)


def test_where_both_models_read_the_same_the_weight_stays():
    x = tokens(500)
    torch.testing.assert_close(
        target.reconstruction_target(weights(), gathered(x, x), 12), weights(), rtol=1e-4, atol=1e-4
    )


def test_what_is_no_gram_matrix_is_told():
    stats = gathered(tokens(50), tokens(50))
    stats[Gram].total.neg_()
    with pytest.raises(NumericsError, match="more calibration tokens"):
        target.reconstruction_target(weights(), stats, 12)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5"])
def test_the_dense_stream_is_that_of_the_dense_model(model_type, ids):
    """What is gathered is what hooks see in two whole models, the pruned one as it then is."""
    model, dense = tiny(model_type), tiny(model_type)
    recipe = Recipe.of(Prune.model_validate({"method": "magnitude", **MOST}), calibrated=True)
    stacks = stack_runners(model, find_architecture(model))
    blocks = list_blocks(stacks, LinearSelection(recipe.pattern))
    names = [linear.name for block in blocks for linear in block.linears]
    pruner = BlockPruner(recipe, dict.fromkeys(names, 0.7), dict.fromkeys(names, torch.float32))
    seen = {}
    aim = target.reconstruction_target

    def look(weight, stats, outputs):
        seen.setdefault(id(stats), stats[CrossGram].total.clone())
        return aim(weight, stats, outputs)

    last = stacks[-1].blocks[-1]
    first = blocks[-1].stages[0][0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunekit.sparsify.block_pruner.reconstruction_target", look)
        walked = iterate_blocks(
            model, stacks, None, split_batches(ids, torch.device("cpu")), with_dense=True
        )
        for visit, block in zip(walked, blocks, strict=True):
            if visit.module is last:
                seen.clear()
            list(pruner.prune(visit, block))
    found = next(iter(seen.values()))
    read = []
    for each in (dense, model):  # only blocks before the last one reach its first stage
        hook = each.get_submodule(first.name).register_forward_pre_hook(
            lambda _, inputs: read.append(inputs[0].flatten(0, -2))
        )
        with torch.no_grad():
            given = {"decoder_input_ids": ids} if model_type == "t5" else {}
            each(input_ids=ids, use_cache=False, **given)
        hook.remove()
    torch.testing.assert_close(found, (read[0] - read[1]).T @ read[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("propagation", ["stage", "block"])
def test_the_outputs_come_nearer_to_those_of_the_dense_model(propagation, ids):
    model = tiny("llama")
    ids = torch.randint(3, 60, (24, 16), generator=torch.Generator().manual_seed(1))
    misses = []
    for aims in ("layer", "dense"):
        pruned = copy.deepcopy(model)
        settings = MOST | {"target": aims, "propagation": propagation}
        prunekit.prune(pruned, ids, method="sparsegpt", **settings)
        with torch.no_grad():
            difference = model.model(ids)[0] - pruned.model(ids)[0]
        misses.append(float(difference.square().mean()))
    assert misses[1] < misses[0]


def test_a_stopped_run_ends_with_the_same_bytes(tmp_path):
    folder = write(tmp_path / "m")
    sections = {"prune": {"method": "sparsegpt", **MOST}}
    list(prunekit.run(planned(folder, tmp_path / "whole", **sections)))
    records = prunekit.run(planned(folder, tmp_path / "out", **sections))
    blocks = 0
    for record in records:
        blocks += record.kind == "block"
        if blocks == 1 and record.kind == "layer":
            records.close()
    list(prunekit.run(planned(folder, tmp_path / "out", **sections), resume=True))
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_the_plan_counts_the_dense_stream(tmp_path):
    folder = write(tmp_path / "m")
    plans = [
        planned(folder, tmp_path / "out", prune={"method": "sparsegpt", **MOST, "target": aims})
        for aims in ("layer", "dense")
    ]
    layer, dense = (plan.memory for plan in plans)
    assert dense.hidden == 2 * layer.hidden
    assert dense.statistics > layer.statistics
    assert dense.block > layer.block
    assert plans[1].recipe.needs == (CrossGram, Gram)


def test_needs_tokens_and_one_step(ids):
    with pytest.raises(ConfigError, match="target dense: needs calibration tokens"):
        prunekit.prune(tiny("llama"), method="magnitude", **MOST)
    with pytest.raises(ValidationError, match="allows only 1 step"):
        Prune.model_validate({"method": "magnitude", "steps": 2, **MOST})


def test_is_the_dense_model_by_default_where_it_was_measured_to_be_better():
    half = {"pattern": "unstructured", "sparsity": 0.5}
    targets = {
        (method, steps): Prune.model_validate({"method": method, "steps": steps, **half}).target
        for method in ("admm", "alps", "sparsegpt", "wanda")
        for steps in (1, 2)
    }
    assert [key for key, value in targets.items() if value == "dense"] == [("admm", 1)]
    said = {"method": "admm", "target": "layer", **half}
    assert Prune.model_validate(said).target == "layer"


def test_a_block_that_stays_dense_lets_both_models_go_on(ids):
    names = [
        layer["name"]
        for layer in prunekit.prune(tiny("llama"), ids, **MOST, skip=["model.layers.0.*"])
    ]
    assert names
    assert not [name for name in names if name.startswith("model.layers.0.")]
