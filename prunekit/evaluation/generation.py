"""Generation speed of a checkpoint and quality of the generated text.

Speed is measured with the weights as stored: zeros in dense weights do not make it faster.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import transformers
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.checkpoint.hub import checkpoint_folder
from prunekit.checkpoint.reader import Checkpoint, open_checkpoint
from prunekit.errors import ConfigError
from prunekit.evaluation import text_quality
from prunekit.models.devices import (
    compute_dtype,
    resolve_device,
    stored_dtype,
    synchronized_seconds,
)
from prunekit.models.empty_model import max_tokens
from prunekit.models.hf_config import call_transformers, config_and_class
from prunekit.models.load import open_whole
from prunekit.models.memory import report_exhausted
from prunekit.models.vocabulary import load_tokenizer

PROMPTS = (
    "The history of the city begins with",
    "Once upon a time there was a little girl who",
    "The most important thing to know about energy is",
)
SAMPLES_AT_ONCE = 16
"""Batch size of sampled text."""
RUNS = 3
"""Timed runs of each prompt, after one warm-up run; the median is reported."""


@dataclass(frozen=True)
class Generation:
    """Continuation of one prompt, its quality and its speed.

    Attributes:
        prompt: The prompt.
        text: The generated continuation.
        prefill: Prompt tokens per second in one forward.
        decode: New tokens per second after the first one, which the prefill produces.
        lexical_diversity: See :func:`text_quality.lexical_diversity`.
        repetition: See :func:`text_quality.repetition`.
    """

    prompt: str
    text: str
    prefill: float
    decode: float
    lexical_diversity: float
    repetition: float


@torch.inference_mode()
def sample_text(
    checkpoint: Checkpoint, device: torch.device, shape: tuple[int, int], seed: int
) -> Int64[Tensor, "N T"]:
    """Sample unconditional text from a causal language model at temperature 1.

    Each sample starts with the beginning-of-text token of the tokenizer, or the end-of-text token
    without one. End-of-text tokens that the model generates are kept, and sampling continues after
    them.

    Args:
        checkpoint: The model, loaded as a whole.
        device: Device to generate on.
        shape: N samples of T tokens each.
        seed: Random seed.

    Raises:
        ConfigError: The tokenizer has neither token.
    """
    tokenizer = load_tokenizer(checkpoint)
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    if first is None:
        raise ConfigError(
            f"{checkpoint.folder}: its tokenizer has no start token, so the model cannot generate "
            'its own calibration text. Name a text instead of "self".'
        )
    samples, length = shape
    dtype = compute_dtype(stored_dtype(checkpoint), device)
    begin = torch.full((samples, 1), cast("int", first), device=device)
    with (
        open_whole(checkpoint, dtype, device) as model,
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        model.generation_config = transformers.GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=length - 1, pad_token_id=first
        )
        torch.manual_seed(seed)
        parts = call_transformers(
            checkpoint,
            "cannot generate text with the model",
            lambda: [
                model.generate(part, attention_mask=torch.ones_like(part))  # pyright: ignore
                for part in begin.split(SAMPLES_AT_ONCE)
            ],
        )
    return torch.cat(parts).cpu()


@report_exhausted()
def generate(
    path: str, new_tokens: int, prompts: Sequence[str] = PROMPTS, device: str = "auto"
) -> list[Generation]:
    """Continue prompts greedily with a causal language model.

    Args:
        path: Folder or name of the checkpoint.
        new_tokens: Number of new tokens per prompt, exactly.
        prompts: Texts to continue.
        device: Device as in a config.

    Raises:
        ConfigError: The model does not generate text, or prompt and new tokens exceed its maximum
            sequence length.
    """
    checkpoint = open_checkpoint(checkpoint_folder(path))
    _, kind = config_and_class(checkpoint)
    if kind is None or not kind.can_generate():
        raise ConfigError(
            f"{path}: {kind.__name__ if kind else 'the base model'} does not generate text."
        )
    tokenizer, target = load_tokenizer(checkpoint), resolve_device(device)
    dtype = compute_dtype(stored_dtype(checkpoint), target)
    with open_whole(checkpoint, dtype, target) as model:
        most = max_tokens(model) - max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
        if new_tokens > most:
            raise ConfigError(
                f"{path}: cannot generate {new_tokens} tokens for each prompt; after the longest "
                f"prompt, at most {most} fit into its maximum sequence length."
            )
        model.generation_config = transformers.GenerationConfig(
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )
        return call_transformers(
            checkpoint,
            "cannot generate text with the model",
            lambda: [_generate(model, tokenizer, prompt, target) for prompt in prompts],
        )


@torch.inference_mode()
def _generate(
    model: PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt: str,
    device: torch.device,
) -> Generation:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    prompt_length = inputs["input_ids"].shape[1]
    prefill, _ = _timed(lambda: model(**inputs, use_cache=True).logits, device)
    whole, ids = _timed(lambda: model.generate(**inputs), device)  # pyright: ignore
    new = ids[0, prompt_length:]
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    words = text_quality.words(text)
    return Generation(
        prompt=prompt,
        text=text,
        prefill=prompt_length / prefill,
        decode=(len(new) - 1) / max(whole - prefill, 1e-9),
        lexical_diversity=text_quality.lexical_diversity(words),
        repetition=text_quality.repetition(words),
    )


def _timed(call: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Return the median seconds of a call and its last result."""
    result, seconds = call(), []
    for _ in range(RUNS):
        began = synchronized_seconds(device)
        result = call()
        seconds.append(synchronized_seconds(device) - began)
    return statistics.median(seconds), result
