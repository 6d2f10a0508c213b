"""How fast a checkpoint reads and writes text, and how varied what it writes is.

Masks in dense weights change no speed; this says what is, not what might be.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import cast

import torch
import transformers
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.checkpoint.hub import find
from prunekit.checkpoint.reader import Checkpoint, open_checkpoint
from prunekit.errors import ConfigError
from prunekit.evaluation import text_quality
from prunekit.models.devices import compute_dtype, device_of, now, stored_dtype
from prunekit.models.empty_model import longest
from prunekit.models.memory import spread
from prunekit.models.vocabulary import load_tokenizer

PROMPTS = (
    "The history of the city begins with",
    "Once upon a time there was a little girl who",
    "The most important thing to know about energy is",
)
AT_ONCE = 16
"""Samples that a model writes at once."""
RUNS = 3
"""Timed runs of each prompt, after one to warm up; the median counts."""


@dataclass(frozen=True)
class Generated:
    """What was written to a prompt, and the speed of reading it and of writing.

    ``prefill`` and ``decode`` are tokens a second: of the prompt in one forward, and of the tokens
    after the first new one, which the prefill gives.
    """

    prompt: str
    text: str
    prefill: float
    decode: float
    lexical_diversity: float
    repetition: float


@torch.inference_mode()
def write(
    checkpoint: Checkpoint, device: torch.device, shape: tuple[int, int], seed: int
) -> Int64[Tensor, "N T"]:
    """Return text that a causal language model writes when left to itself, at temperature 1.

    Each sample begins with the token that the tokenizer begins a text with, or ends one; whatever
    the model then writes is left, an end of text included, after which it goes on.

    Args:
        checkpoint: The model; it is in memory whole.
        device: Where it writes.
        shape: N samples, T tokens of each.
        seed: Of what is drawn.

    Raises:
        ConfigError: The tokenizer has neither token.
    """
    tokenizer = load_tokenizer(checkpoint)
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    if first is None:
        raise ConfigError(
            f"{checkpoint.folder}: its tokenizer has no token to begin with, so the model cannot "
            'write its own calibration text. Name a text instead of "self".'
        )
    samples, length = shape
    begin = torch.full((samples, 1), cast("int", first), device=device)
    with (
        opened(checkpoint, device) as model,
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        model.generation_config = transformers.GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=length - 1, pad_token_id=first
        )
        torch.manual_seed(seed)
        parts = [
            model.generate(part, attention_mask=torch.ones_like(part))  # pyright: ignore
            for part in begin.split(AT_ONCE)
        ]
    return torch.cat(parts).cpu()


@contextmanager
def opened(checkpoint: Checkpoint, device: torch.device) -> Iterator[PreTrainedModel]:
    """Give a whole model as transformers opens it: on the device, or where there is room for it."""
    name = checkpoint.config["architectures"][0]
    dtype = compute_dtype(stored_dtype(checkpoint), device)
    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, name)
    count = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    with TemporaryDirectory(prefix="prunekit-") as offload:
        places = spread(count * dtype.itemsize, device, offload)
        model = kind.from_pretrained(checkpoint.folder, dtype=dtype, **places)
        yield (model if places else model.to(device)).eval()


def generate(
    path: str, new_tokens: int, prompts: Sequence[str] = PROMPTS, device: str = "auto"
) -> list[Generated]:
    """Let a causal language model go on with prompts, greedily, ``new_tokens`` each.

    Raises:
        ConfigError: The model does not generate, or not so much.
    """
    checkpoint = open_checkpoint(find(path))
    tokenizer, place = load_tokenizer(checkpoint), device_of(device)
    name = (checkpoint.config.get("architectures") or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None or not getattr(kind, "can_generate", lambda: False)():
        raise ConfigError(f"{path}: {name or 'the base model'} does not generate text.")
    with opened(checkpoint, place) as model:
        most = longest(model) - max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
        if new_tokens > most:
            raise ConfigError(
                f"{path}: cannot write {new_tokens} tokens to each prompt; with what it reads "
                f"before, at most {most} fit into what the model takes."
            )
        model.generation_config = transformers.GenerationConfig(
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )
        return [_generate(model, tokenizer, prompt, place) for prompt in prompts]


@torch.inference_mode()
def _generate(
    model: PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt: str,
    device: torch.device,
) -> Generated:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    read = inputs["input_ids"].shape[1]
    prefill, _ = _timed(lambda: model(**inputs, use_cache=True).logits, device)
    whole, ids = _timed(lambda: model.generate(**inputs), device)  # pyright: ignore
    new = ids[0, read:]
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    words = text_quality.words(text)
    return Generated(
        prompt=prompt,
        text=text,
        prefill=read / prefill,
        decode=(len(new) - 1) / max(whole - prefill, 1e-9),
        lexical_diversity=text_quality.lexical_diversity(words),
        repetition=text_quality.repetition(words),
    )


def _timed(call: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Return the median seconds of a call and what the last one gave."""
    result, seconds = call(), []
    for _ in range(RUNS):
        began = now(device)
        result = call()
        seconds.append(now(device) - began)
    return statistics.median(seconds), result
