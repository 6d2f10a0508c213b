"""Which blocks and coordinates of a model go with those of its teacher."""

import pytest
import torch

import prunekit
from prunekit.errors import ConfigError
from prunekit.training.distill_blocks import BlockMap, kept_coordinates, stream_width
from prunekit.training.teachers import DenseTeacher
from tests.support.architectures import tiny

NAME = "model.layers"


def without_blocks(keep, **sizes):
    """Return a teacher and a model that keeps some of its blocks."""
    model = tiny("llama", **sizes)
    teacher, blocks = DenseTeacher(model), prunekit.blocks(model)
    blocks.close({NAME: torch.tensor(keep)})
    blocks.finalize()
    return teacher, model, {NAME: [unit for unit, kept in enumerate(keep) if kept]}


def pairs(teacher, model, kept):
    """Return the candidate of each block of the teacher that is drawn in a hundred steps."""
    theirs, ours = ([*base.model.layers] for base in (teacher.model, model))
    blocks = BlockMap(model, teacher, kept)
    found = {}
    for step in range(100):
        for target in blocks.targets(0, step, "same"):
            (candidate,) = target.candidates
            found[theirs.index(target.block)] = ours.index(candidate)
    return found


def test_a_block_goes_with_itself_or_with_the_nearest_that_is_left():
    """Of two that are as near it is the one before."""
    keep = [True, False, True, False, False, True]
    found = pairs(*without_blocks(keep, num_hidden_layers=6))
    assert found == {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2}


def test_blocks_of_a_gated_model_are_known_after_their_removal_too():
    model = tiny("llama", num_hidden_layers=4)
    teacher = DenseTeacher(model)
    blocks = BlockMap(model, teacher, {})
    gates = prunekit.blocks(model)
    gates.close({NAME: torch.tensor([True, True, False, True])})
    gates.finalize()
    last = {
        each.quarter: [*model.model.layers].index(each.candidates[0])
        for each in blocks.targets(0, 1, "same")
    }
    assert last == {0: 0, 1: 1, 2: 1, 3: 2}


def test_depth_counts_through_encoder_and_decoder_and_each_has_its_own_candidates():
    model = tiny("t5")
    encoder, decoder = [*model.encoder.block], [*model.decoder.block]
    seen = set()
    for step in range(50):
        targets = BlockMap(model, DenseTeacher(model), {}).targets(0, step, "closest")
        assert [each.quarter for each in targets] == [0, 1, 2, 3]
        assert [each.decodes for each in targets] == [False, False, True, True]
        assert all(each.candidates == (decoder if each.decodes else encoder) for each in targets)
        seen |= {each.quarter for each in targets}
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("kept", [{}, {NAME: [0, 1]}])
def test_blocks_that_are_missing_have_to_be_named(kept):
    teacher, model, _ = without_blocks([True, False])
    with pytest.raises(ConfigError, match=r"1 blocks in model\.layers, in the teacher 2.*kept="):
        BlockMap(model, teacher, kept)


def test_a_teacher_of_another_family_is_refused():
    with pytest.raises(
        ConfigError, match=r"teacher: it has blocks in transformer\.h, the model in"
    ):
        BlockMap(tiny("llama"), DenseTeacher(tiny("gpt2")), {})


def test_coordinates_are_placed_by_name_of_the_embeddings():
    model = tiny("llama")
    hidden = prunekit.hidden(model)
    hidden.prune(hidden.score("magnitude"), 0.5)
    kept = hidden.finalize().kept
    assert stream_width(model) == 16
    assert kept_coordinates(model, 32, kept) == kept["model.embed_tokens"]
    assert kept_coordinates(tiny("llama"), 32, {}) is None
    for wrong in ({}, {"model.embed_tokens": [1, 2]}):
        with pytest.raises(ConfigError, match=r"have 16 coordinates, the teacher's 32\. Say which"):
            kept_coordinates(model, 32, wrong)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "gpt2", "opt", "t5", "bloom", "mpt"])
def test_the_width_of_hidden_states_is_known_in_any_family(model_type):
    assert stream_width(tiny(model_type)) == 32
