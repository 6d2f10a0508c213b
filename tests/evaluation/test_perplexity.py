"""Perplexity block by block: that of the whole model, whatever the batches."""

import math

import pytest
import torch
from transformers import AutoModel

import prunekit
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.data.tokens import Tokens
from prunekit.errors import CheckpointError, ConfigError
from prunekit.evaluation import perplexity
from prunekit.evaluation.perplexity import Evaluator, evaluate, perplexity_of
from prunekit.models.devices import compute_dtype, device_of, measuring_dtype, stored_dtype
from prunekit.models.layout import is_causal_language_model
from tests.support import checkpoints
from tests.support.architectures import tiny

CPU = torch.device("cpu")
CAUSAL = ["gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi3", "qwen3"]


@pytest.fixture
def tokens():
    ids = torch.randint(3, 60, (5, 23), generator=torch.Generator().manual_seed(1))
    return Tokens.of(ids, "5 windows of 23 tokens")


def evaluator(folder):
    return Evaluator(open_checkpoint(folder), CPU)


def exact(model, ids):
    """Return the perplexity of ids[:, 1:] in float64, from the whole model at once."""
    with torch.no_grad():
        logits = model.double()(input_ids=ids).logits[:, :-1]
    chosen = logits.log_softmax(-1).gather(2, ids[:, 1:, None])
    return math.exp(-chosen.mean().item())


@pytest.mark.parametrize("model_type", CAUSAL)
def test_perplexity_is_that_of_the_whole_model(tmp_path, model_type, tokens):
    found = evaluator(checkpoints.write(tmp_path, model_type)).perplexity(tokens)
    assert found["metric"] == "perplexity"
    assert found["tokens"] == 5 * 22
    assert found["value"] == pytest.approx(exact(tiny(model_type), tokens.ids), rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 50, 4096])
@pytest.mark.parametrize("head_tokens", [1, 7, 256])
def test_perplexity_does_not_depend_on_batches(
    tmp_path, tokens, monkeypatch, batch_tokens, head_tokens
):
    monkeypatch.setitem(prunekit.walk.BATCH_TOKENS, "cpu", batch_tokens)
    monkeypatch.setattr(perplexity, "HEAD_TOKENS", head_tokens)
    found = evaluator(checkpoints.write(tmp_path, "gemma3_text")).perplexity(tokens)
    expected = exact(tiny("gemma3_text"), tokens.ids)
    assert found["value"] == pytest.approx(expected, rel=1e-5)


def test_the_protocol_says_what_was_measured(tmp_path, tokens):
    folder = checkpoints.write(tmp_path, dtype=torch.bfloat16)
    assert evaluator(folder).perplexity(tokens)["protocol"] == (
        "5 windows of 23 tokens; 110 predicted tokens, the first of a window is not predicted; "
        "token-weighted mean, float32 logits, float32 blocks"
    )


def test_perplexity_beyond_all_numbers_is_infinite(tmp_path, tokens):
    assert perplexity_of(1e6, 10) == math.inf
    assert perplexity_of(0.0, 10) == 1.0
    folder = checkpoints.write(tmp_path)
    checkpoints.change(folder, "lm_head.weight", lambda weight: weight.mul_(1e6))
    assert evaluator(folder).perplexity(tokens)["value"] == math.inf


def test_a_window_of_one_token_predicts_nothing_and_is_refused(tmp_path, tokens):
    with pytest.raises(ConfigError, match=r"one token long"):
        evaluator(checkpoints.write(tmp_path)).perplexity(Tokens.of(tokens.ids[:, :1], ""))


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "t5"])
def test_what_is_no_causal_language_model_is_refused(tmp_path, model_type, tokens):
    judge = evaluator(checkpoints.write(tmp_path, model_type))
    assert not is_causal_language_model(judge.model, judge.stacks)
    with pytest.raises(ConfigError, match=r"perplexity needs a causal language model"):
        judge.perplexity(tokens)


def test_a_causal_model_without_a_head_is_refused(tmp_path, tokens):
    judge = evaluator(checkpoints.write(tmp_path, "llama", head=AutoModel))
    with pytest.raises(ConfigError, match=r"^LlamaModel: perplexity needs"):
        judge.perplexity(tokens)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "t5", "roberta"])
def test_answers_are_those_of_the_whole_model(tmp_path, model_type, tokens):
    folder, model = checkpoints.write(tmp_path, model_type), tiny(model_type)
    inputs = {"input_ids": tokens.ids}
    if model_type == "t5":
        inputs["decoder_input_ids"] = tokens.ids
    with torch.no_grad():
        expected = model(**inputs)[0]
    torch.testing.assert_close(evaluator(folder).answers(tokens.ids), expected)


def test_a_folder_is_judged_by_its_own_tokenizer_and_no_longer_than_it_takes(tmp_path):
    folder = checkpoints.write(tmp_path)
    text = str(folder / "text.txt")
    (found,) = evaluate(str(folder), [text], length=4096, windows=3, device="cpu")
    assert found["tokens"] == 3 * 63
    assert found["data"].endswith("text.txt")
    with pytest.raises(CheckpointError, match="no such folder"):
        evaluate("nobody/nothing", [text], length=8, windows=1)


@pytest.mark.parametrize("units", [True, False])
def test_blocks_run_as_stored_where_that_is_multiplied(tmp_path, monkeypatch, units):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    folder = checkpoints.write(tmp_path, dtype=torch.bfloat16)
    checkpoints.change(folder, "model.norm.weight", lambda weight: weight.float())
    stored = stored_dtype(open_checkpoint(folder))
    assert stored == torch.bfloat16
    assert compute_dtype(stored, CPU) == (torch.bfloat16 if units else torch.float32)
    assert compute_dtype(torch.float16, CPU) == torch.float32
    assert compute_dtype(stored, torch.device("cuda")) == torch.bfloat16
    assert measuring_dtype(stored, CPU) == torch.float32
    assert measuring_dtype(stored, torch.device("cuda")) == torch.bfloat16


def test_a_device_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_of("auto") == device_of("cuda") == torch.device("cuda")
    with pytest.raises(ConfigError, match='"cuda:1" is not here: PyTorch sees 1 GPUs'):
        device_of("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == CPU
    for name in ("cuda", "cuda:0", "gpu"):
        with pytest.raises(ConfigError, match=f'"{name}" is not .* Choose'):
            device_of(name)
