"""Generation: what is counted, and what is refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunekit.errors import ConfigError
from prunekit.generation import generate
from tests.checkpoints import write


def test_writes_what_greedy_decoding_writes(tmp_path: Path):
    folder = write(tmp_path / "model")
    (found,) = generate(str(folder), 6, ["the quick"], device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("the quick", return_tensors="pt", return_token_type_ids=False)["input_ids"]
    read = ids.shape[1]
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert found.text == tokenizer.decode(ids[0, read:], skip_special_tokens=True)
    assert found.prefill > 0
    assert found.decode > 0
    assert 0 <= found.repetition <= 1


def test_refuses_a_model_that_does_not_generate(tmp_path: Path):
    folder = write(tmp_path / "model", "bert")
    with pytest.raises(ConfigError, match="does not generate text"):
        generate(str(folder), 4, ["the"], device="cpu")
