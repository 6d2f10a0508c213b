"""Scores by block are those of the whole model, from one block of weights at a time."""

import pytest
import torch

import prunekit
from prunekit.architectures import find_architecture
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import CheckpointError
from prunekit.models.empty_model import empty_model
from prunekit.models.layout import stack_runners
from prunekit.models.sequential.weights import Weights
from prunekit.structured.blockwise.block_passes import BlockPasses
from prunekit.structured.rankers import rankers
from prunekit.structured.unit_gates import Gates
from tests.support.units import randomized_model

CPU = torch.device("cpu")
FAMILIES = [
    "llama",
    "t5",
    *(pytest.param(each, marks=pytest.mark.soak) for each in ("bert", "gpt2")),
]
NARROW = {"t5": {"d_ff": 24}, "gpt2": {"n_inner": 24}}
OF_BLOCKS = ["block-influence", "gradient", "leave-one-out", "magnitude", "random"]


def batches(model, samples=4, size=2):
    """Samples of one length, with labels where the model needs them."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 96, (samples, 10), generator=generator)
    found = [{"input_ids": part} for part in ids.split(size)]
    if model.config.is_encoder_decoder:
        labels = torch.randint(3, 96, (samples, 7), generator=generator)
        found = [
            each | {"labels": part} for each, part in zip(found, labels.split(size), strict=True)
        ]
    elif type(model).__name__.endswith("MaskedLM"):
        found = [each | {"labels": each["input_ids"]} for each in found]
    return found


def passes_of(checkpoint):
    model = empty_model(checkpoint)
    weights = Weights(model, checkpoint, torch.float64, CPU)
    stacks = stack_runners(model, find_architecture(model))
    return BlockPasses(model, stacks, weights, batches(model))


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A model in memory, and the passes over one whose weights are in a checkpoint only."""
    model = randomized_model(request.param, **NARROW.get(request.param, {})).double()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, passes_of(open_checkpoint(folder))


def assert_same(found, expected, tolerance=1e-9):
    assert list(found) == list(expected)
    for name, scores in expected.items():
        torch.testing.assert_close(found[name], scores, rtol=tolerance, atol=tolerance / 1000)


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_every_ranker_scores_heads_and_neurons_as_in_the_whole_model(saved, kind):
    model, passes = saved
    known = {name: made() for name, made in rankers().items()}
    chosen = [each for each in known.values() if all(kind in c.kinds for c in each.components)]
    assert len(chosen) == (13 if kind == "heads" else 12)
    if kind == "neurons":  # which are many: heads and blocks are left out too
        chosen = [each for each in chosen if each.name != "leave-one-out"]
    with Gates(model, kind) as whole, Gates(passes.model, kind, CPU) as streamed:
        for gates in (whole, streamed):  # a closed unit changes what comes after it
            gates.gates[gates.groups[0].name].keep[1] = False
        for ranker in chosen:
            expected = whole.score(ranker, passes.batches)
            assert_same(streamed.score_blockwise(ranker, passes), expected)


OF_COORDINATES = {
    "gradient": {},
    "leave-one-out": {},
    "magnitude": {},
    "random": {},
    "salience": {"window": 20, "smoothing": 0.85},
}


@pytest.mark.parametrize("name", OF_COORDINATES)
def test_every_ranker_scores_coordinates_as_in_the_whole_model(saved, name):
    model, passes = saved
    if model.config.model_type in {"bert", "gpt2"}:
        pytest.skip("a LayerNorm has no coordinates that can be removed")
    # A new model: weights that were loaded and dropped are not tied any more.
    passes = passes_of(passes.weights.checkpoint)
    passes.model.tie_weights()
    ranker = rankers()[name](**OF_COORDINATES[name])
    assert "hidden" in ranker.kinds
    with prunekit.hidden(model) as whole, Gates(passes.model, "hidden", CPU) as streamed:
        for gates in (whole, streamed):
            gates.gates[gates.groups[0].name].keep[1] = False
        expected = whole.score(ranker, passes.batches)
        # One gate is at all norms: its gradients are added in float32, or by block in float64.
        assert_same(streamed.score_blockwise(ranker, passes), expected, tolerance=1e-6)


def test_norms_outside_of_blocks_that_cannot_be_run_by_themselves_are_refused(saved):
    model, passes = saved
    if model.config.model_type != "llama":
        pytest.skip("one family is enough")
    decoder = passes.stacks[-1].module
    decoder.extra = torch.nn.Identity()
    try:
        with pytest.raises(CheckpointError, match=r"model.extra and model.norm: a stack has one"):
            next(passes.backward([decoder.norm, decoder.extra]))
    finally:
        del decoder.extra


@pytest.mark.parametrize("name", OF_BLOCKS)
def test_every_ranker_scores_blocks_as_in_the_whole_model(saved, name):
    model, passes = saved
    ranker = rankers()[name]()
    with prunekit.blocks(model) as whole, Gates(passes.model, "blocks", CPU) as streamed:
        expected = whole.score(ranker, passes.batches)
        assert_same(streamed.score_blockwise(ranker, passes), expected)


def test_settings_that_compare_layers_or_rankers_are_applied_to_all_blocks_together(saved):
    model, passes = saved
    chosen = [
        rankers()["gradient"](normalised=True),
        rankers()["hybrid"](of={"gradient": 1.0, "random": 0.5}, by="z-score"),
        rankers()["salience"](window=20, smoothing=0.85),
    ]
    with prunekit.heads(model) as whole, Gates(passes.model, "heads", CPU) as streamed:
        for ranker in chosen:
            expected = whole.score(ranker, passes.batches)
            assert_same(streamed.score_blockwise(ranker, passes), expected)
    with prunekit.blocks(model) as whole, Gates(passes.model, "blocks", CPU) as streamed:
        expected = whole.score(chosen[0], passes.batches)
        assert_same(streamed.score_blockwise(chosen[0], passes), expected)


def test_a_group_without_open_units_scores_zero_and_is_not_looked_at(saved):
    _, passes = saved
    with Gates(passes.model, "neurons", CPU) as gates:
        first = gates.groups[0].name
        gates.gates[first].keep[:] = False
        scores = gates.score_blockwise(rankers()["flap"](), passes)
    assert set(scores) == {group.name for group in gates.groups}
    assert not scores[first].any()
    assert all(bool(each.any()) for name, each in scores.items() if name != first)
