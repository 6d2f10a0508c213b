"""The model that is trained and pruned, its text, and one run of training."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bench.jobs.end_to_end import SHARED
from bench.quality.quality import perplexity
from prunekit.data.tokens import calibration_tokens, evaluation_tokens
from prunekit.models import stock

BATCH, LENGTH = 8, 128
"""Samples of a batch, tokens of a sample."""
RATE = 5e-4
"""Learning rate of AdamW, constant; the weight decay is PyTorch's default."""
EVERY = 10
"""Steps between two prunings of a schedule."""


@dataclass(frozen=True)
class Ask:
    """What a contestant has to do.

    Attributes:
        sparsity: Fraction of zeros in each linear of the blocks at ``end``.
        end: Step at which a schedule ends.
        every: Steps between two prunings.
        tokens: Calibration samples [N, T].
    """

    sparsity: float
    end: int
    every: int = EVERY
    tokens: Tensor | None = None


AfterStep = Callable[[], None]
"""Called after each step of the optimizer; does nothing where hooks do the work."""
Attach = Callable[[PreTrainedModel, Optimizer, Ask], AbstractContextManager[AfterStep]]
"""Prunes a model while it is trained, within the context."""


@dataclass(frozen=True)
class Task:
    """A language model and its text."""

    name: str
    model: Path
    train: Path
    valid: Path

    def load(self) -> PreTrainedModel:
        """Return the dense model, in train mode."""
        return stock.open_model(self.model, dtype=torch.float32).train()

    def samples(self, count: int, seed: int) -> Tensor:
        """Return random windows of the training text, [count, LENGTH]."""
        tokenizer = stock.read_tokenizer(self.model)
        return calibration_tokens(tokenizer, [str(self.train)], count, LENGTH, seed).ids

    def perplexity(self, model: PreTrainedModel) -> float:
        """Return the perplexity on the held-out text."""
        tokenizer = stock.read_tokenizer(self.model)
        judged = evaluation_tokens(tokenizer, [str(self.valid)], LENGTH).ids
        model.eval()
        found = perplexity(model, judged)
        model.train()
        return found


def task() -> Task | None:
    """Return gpt2-tinystories; None, said aloud, if it is absent."""
    model, text = SHARED / "models/gpt2-tinystories", SHARED / "data/tinystories"
    if not model.is_dir():
        print(f"{model} is absent: nothing is measured.")
        return None
    return Task("gpt2-tinystories", model, text / "train.txt", text / "valid.txt")


def linears(model: nn.Module) -> list[nn.Module]:
    """Return the linears of the blocks, which all contestants prune."""
    return [module for module in model.modules() if isinstance(module, Conv1D)]


def weights(model: nn.Module) -> list[Tensor]:
    """Return their weights as the forward uses them."""
    return [module.weight for module in linears(model)]  # pyright: ignore


def new_optimizer(model: nn.Module) -> AdamW:
    """Return the optimizer of all contestants."""
    return AdamW(model.parameters(), lr=RATE)


def loss_of(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Return the mean loss of a batch [B, T]."""
    return model(input_ids=batch, labels=batch).loss


def train_step(model: PreTrainedModel, optimizer: Optimizer, batch: Tensor) -> float:
    """Make one step; return the loss before it."""
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def train(found: Task, attach: Attach, ask: Ask, *, steps: int, seed: int) -> dict[str, Any]:
    """Return the quality, counted zeros, curve and time of one run.

    Args:
        found: The model and its text.
        attach: The contestant.
        ask: What it has to do.
        steps: Steps of training.
        seed: Seed of the batches and of dropout.
    """
    model, parts = found.load(), found.samples(steps * BATCH, seed).split(BATCH)
    optimizer = new_optimizer(model)
    torch.manual_seed(seed)
    began, curve = time.perf_counter(), []
    with attach(model, optimizer, ask) as after_step:
        for step in range(1, steps + 1):
            loss = train_step(model, optimizer, parts[(step - 1) % len(parts)])
            after_step()
            if step % max(1, steps // 20) == 0:
                curve.append({"step": step, "loss": loss, "sparsity": sparsity(model)})
        seconds = time.perf_counter() - began
    return {
        "perplexity": found.perplexity(model),
        "counted": sparsity(model),
        "seconds": seconds,
        "curve": curve,
    }


def sparsity(model: nn.Module) -> float:
    """Return the fraction of zeros in the linears of the blocks, counted."""
    every = [weight.detach() for weight in weights(model)]
    zeros = sum(int((weight == 0).sum()) for weight in every)
    return zeros / sum(weight.numel() for weight in every)


def held_bytes() -> int:
    """Return the bytes of all tensors alive, each storage once."""
    import gc

    gc.collect()
    storages = {}
    for each in gc.get_objects():
        # type(): isinstance asks proxies for their class, and some of them warn.
        if issubclass(type(each), Tensor):
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def cubic(step: int, ask: Ask) -> float:
    """Return ``s (1 − (1 − t/T)³)`` (Zhu & Gupta, arXiv:1710.01878)."""
    return ask.sparsity * (1 - (1 - min(step / ask.end, 1.0)) ** 3)


def due_steps(ask: Ask) -> Iterator[int]:
    """Yield the steps at which a schedule prunes; the end is one of them."""
    yield from range(ask.every, ask.end, ask.every)
    yield ask.end
