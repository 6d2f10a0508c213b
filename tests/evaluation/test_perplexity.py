"""Perplexity computed block by block equals that of the whole model."""

import math

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.data.tokens import Tokens
from prunekit.errors import CheckpointError, ConfigError, NumericsError
from prunekit.evaluation import perplexity
from prunekit.evaluation.perplexity import Evaluator, evaluate, perplexity_from_loss
from prunekit.models.layout import is_causal_language_model
from prunekit.models.sequential import pipeline
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
    """Return the whole model's perplexity on ids[:, 1:] in float64."""
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


@pytest.mark.parametrize("head_tokens", [3, 256])
def test_of_windows_that_overlap_each_token_is_predicted_once(tmp_path, monkeypatch, head_tokens):
    monkeypatch.setattr(perplexity, "HEAD_TOKENS", head_tokens)
    text = torch.randint(3, 60, (29,), generator=torch.Generator().manual_seed(2))
    windows, stride = text.unfold(0, 11, 6), 6
    model = tiny("llama").double()
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1].log_softmax(-1)
    likelihood = logits.gather(2, windows[:, 1:, None])[..., 0]
    expected = torch.cat([likelihood[0], *likelihood[1:, -stride:]])
    assert len(expected) == 28  # all but the first of 29 tokens
    found = evaluator(checkpoints.write(tmp_path)).perplexity(Tokens.of(windows, "4", stride))
    assert found["tokens"] == 28
    assert found["value"] == pytest.approx(math.exp(-expected.mean()), rel=1e-5)
    assert "nor in a window those that the one before has" in found["protocol"]


def test_perplexity_of_text_is_that_of_a_model_with_images(tmp_path, tokens):
    head = AutoModelForImageTextToText
    found = evaluator(checkpoints.write(tmp_path, "llava", head=head)).perplexity(tokens)
    expected = exact(tiny("llava", head), tokens.ids)
    assert found["value"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_an_error(tmp_path, tokens, monkeypatch, loss):
    found = evaluator(checkpoints.write(tmp_path))
    monkeypatch.setattr(found, "_loss", lambda *_: loss)
    with pytest.raises(NumericsError, match=r"the loss of LlamaForCausalLM is (nan|inf)\."):
        found.perplexity(tokens)


def test_a_token_that_the_model_lacks_is_named(tmp_path):
    folder = checkpoints.write(tmp_path, vocab_size=20)
    text = str(folder / "text.txt")
    with pytest.raises(
        ConfigError, match=r"text\.txt: the tokenizer makes '.+' token \d+, but the m"
    ):
        evaluate(str(folder), [text], 8, None, "cpu")


@pytest.mark.parametrize("batch_tokens", [1, 50, 4096])
@pytest.mark.parametrize("head_tokens", [1, 7, 256])
def test_perplexity_does_not_depend_on_batches(
    tmp_path, tokens, monkeypatch, batch_tokens, head_tokens
):
    monkeypatch.setitem(pipeline.BATCH_TOKENS, "cpu", batch_tokens)
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
    assert perplexity_from_loss(1e6, 10) == math.inf
    assert perplexity_from_loss(0.0, 10) == 1.0
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
    torch.testing.assert_close(evaluator(folder).outputs(tokens.ids), expected)


def test_a_folder_is_judged_by_its_own_tokenizer_and_no_longer_than_it_takes(tmp_path):
    folder = checkpoints.write(tmp_path)
    text = str(folder / "text.txt")
    (found,) = evaluate(str(folder), [text], length=4096, windows=3, device="cpu")
    assert found["tokens"] == 3 * 63
    assert found["data"].endswith("text.txt")
    with pytest.raises(CheckpointError, match="no such folder"):
        evaluate("nobody/nothing", [text], length=8, windows=1)
