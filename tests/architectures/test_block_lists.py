"""Lists of blocks of a model of an undeclared type, and the modules that run them."""

import pytest
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from prunekit.architectures.block_lists import (
    BlockList,
    find_block_lists,
    own_embeddings,
    part_of_config,
)
from prunekit.errors import CheckpointError
from tests.support.architectures import tiny
from tests.support.toy_model import Block, Toy


def test_a_decoder_has_one_list_that_the_model_itself_runs():
    assert find_block_lists(tiny("olmo2").base_model) == (BlockList("layers"),)


def test_of_a_model_with_towers_it_is_the_list_of_the_text():
    base = tiny("llava", AutoModelForImageTextToText).base_model
    assert find_block_lists(base) == (BlockList("language_model.layers"),)
    assert part_of_config(base, "language_model.layers") == "text_config"
    assert part_of_config(tiny("olmo2").base_model, "layers") == ""


def test_an_encoder_decoder_has_a_list_on_each_side():
    assert find_block_lists(tiny("bart").base_model) == (
        BlockList("encoder.layers", "encoder", depth="encoder_layers"),
        BlockList("decoder.layers", "decoder", "encoder", "decoder_layers"),
    )


def test_two_lists_without_a_reason_to_choose_are_refused():
    model = Toy(PreTrainedConfig())
    model.others = nn.ModuleList(Block() for _ in range(2))
    with pytest.raises(CheckpointError, match="one list of blocks, this model has blocks, others"):
        find_block_lists(model)


def test_a_module_without_embeddings_has_none():
    assert own_embeddings(nn.Linear(2, 2)) is None
    assert own_embeddings(tiny("llama").base_model) is not None
