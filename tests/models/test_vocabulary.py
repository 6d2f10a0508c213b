"""Token embeddings, output heads and tokenizers of tiny models."""

import json

import pytest
import torch

from prunekit.architectures import find_architecture
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import ConfigError
from prunekit.models.layout import stack_runners
from prunekit.models.vocabulary import (
    input_embeddings,
    load_tokenizer,
    output_heads,
    token_limit,
    vocabulary_modules,
)
from tests.support import checkpoints
from tests.support.architectures import tiny


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_causal_model_has_an_embedding_and_a_head(model_type):
    model = tiny(model_type)
    stacks = stack_runners(model, find_architecture(model))
    embedding, head = vocabulary_modules(model, [runner.module for runner in stacks])
    assert embedding is model.get_input_embeddings()
    assert head is model.lm_head


def test_stacks_that_share_an_embedding_list_it_once():
    model = tiny("t5")
    stacks = stack_runners(model, find_architecture(model))
    found = input_embeddings(model, [runner.module for runner in stacks])
    assert len({id(module) for module in found}) == len(found)
    assert found[0] is model.shared
    assert output_heads(model) == [model.lm_head]


def test_a_base_model_has_no_head():
    assert output_heads(tiny("llama").base_model) == []


def test_the_tokenizer_in_the_folder_is_loaded_or_its_absence_is_named(tmp_path):
    folder = checkpoints.write(tmp_path)
    checkpoint = open_checkpoint(folder)
    assert (
        load_tokenizer(checkpoint)("ab")["input_ids"] == checkpoints.tokenizer()("ab")["input_ids"]
    )
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match="has no tokenizer that can be loaded"):
        load_tokenizer(checkpoint)


@pytest.mark.parametrize("change", ['{"model": {"type": "New"}}', "{", "[]", ""])
def test_a_tokenizer_that_is_damaged_or_newer_is_refused_with_the_versions(tmp_path, change):
    folder = checkpoints.write(tmp_path)
    said = json.loads((folder / "tokenizer.json").read_text())
    change = json.dumps(said | json.loads(change)) if change.startswith('{"') else change
    (folder / "tokenizer.json").write_text(change)
    with pytest.raises(
        ConfigError, match=r"can be loaded .* versions than transformers 5.* and tok"
    ):
        load_tokenizer(open_checkpoint(folder))


def test_the_token_limit_is_that_of_the_smaller_matrix():
    model = tiny("llama")
    stacks = [runner.module for runner in stack_runners(model, find_architecture(model))]
    assert token_limit(model, stacks) == 96
    model.lm_head = torch.nn.Linear(32, 90)
    assert token_limit(model, stacks) == 90
    assert token_limit(model.base_model, stacks) == 96
