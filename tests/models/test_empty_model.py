"""Empty models and checkpoint outlines built from ``config.json`` alone."""

import sys

import pytest
import torch

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import CheckpointError
from prunekit.models.empty_model import (
    checkpoint_from_config,
    empty_model,
    has_weights,
    max_tokens,
)
from tests.support import checkpoints
from tests.support.architectures import FUSED, TINY, tiny


@pytest.mark.parametrize("model_type", [*TINY, *FUSED])
def test_an_empty_model_has_no_weights_but_real_buffers(tmp_path, model_type):
    model = empty_model(open_checkpoint(checkpoints.write(tmp_path, model_type)))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not model.training


@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_a_config_alone_outlines_the_checkpoint(tmp_path, model_type):
    folder = checkpoints.write(tmp_path, model_type, torch.bfloat16)
    stored = open_checkpoint(folder).entries
    assert has_weights(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    assert not has_weights(folder)
    outlined = checkpoint_from_config(folder).entries
    assert {name: (entry.dtype, entry.shape) for name, entry in outlined.items()} == {
        name: (entry.dtype, entry.shape) for name, entry in stored.items()
    }


def test_a_dtype_that_cannot_be_planned_is_refused(tmp_path):
    folder = checkpoints.write(tmp_path)
    checkpoints.configure(folder, dtype="float64")
    with pytest.raises(CheckpointError, match=r"config.json: dtype 'float64' cannot be planned"):
        checkpoint_from_config(folder)


LIMITS = {"roberta": 63, "t5": sys.maxsize}


@pytest.mark.parametrize("model_type", TINY)
def test_the_longest_input_runs_and_one_more_token_does_not_where_positions_are_a_table(model_type):
    # RoBERTa's positions start after the padding token's row, here row 0.
    model = tiny(model_type, max_position_embeddings=64) if model_type != "t5" else tiny("t5")
    limit = max_tokens(model)
    assert limit == LIMITS.get(model_type, 64)
    if model_type in {"roberta", "bert", "distilbert", "gpt2", "opt"}:
        with torch.no_grad():
            model(input_ids=torch.full((1, limit), 5))
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, limit + 1), 5))


def test_a_vocabulary_as_large_as_the_context_is_not_taken_for_positions():
    model = tiny("llama", vocab_size=64, max_position_embeddings=64, pad_token_id=63)
    assert max_tokens(model) == 64
