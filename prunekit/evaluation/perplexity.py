"""Perplexity of a checkpoint, block by block, so that a model larger than memory can be judged.

All windows pass a block before the next one is read, so a device holds one block at a time, and of
several devices each, as a rank, takes a share of the windows. A device map of the whole model would
have each device wait for the one before it, and read what is in files anew for every batch.

Shapes: N windows, T tokens, B windows of a batch, D features, V vocabulary.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from prunekit.architectures import find
from prunekit.checkpoint.hub import find as find_checkpoint
from prunekit.checkpoint.reader import Checkpoint, open_checkpoint
from prunekit.data.sources import title
from prunekit.data.tokens import Tokens, evaluation_tokens
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError
from prunekit.models.devices import device_of, measuring_dtype, stored_dtype
from prunekit.models.empty_model import empty_model, longest
from prunekit.models.layout import is_causal_language_model, runners
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.hidden_states import choose_offload, hidden_states_factory, scratch
from prunekit.models.sequential.pipeline import LoadedBlock, batches, iterate_blocks
from prunekit.models.sequential.weights import Weights, loaded_weights
from prunekit.models.vocabulary import heads, load_tokenizer

HEAD_TOKENS = 256
"""Positions whose logits are held at once; the float32 logits of a whole window can outweigh the
rest of the model."""


class Evaluator:
    """Measures checkpoints of one architecture on one device, block by block.

    Hidden states that fit no memory go to a file without a name in ``folder``: that of a run's
    output, or the checkpoint's own, so that it is a disk with room for a model.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, folder: Path | None = None
    ) -> None:
        self.model = empty_model(checkpoint)
        self.stacks = runners(self.model, find(self.model))
        dtype = measuring_dtype(stored_dtype(checkpoint), device)
        self.weights = Weights(self.model, checkpoint, dtype, device)
        self.device, self.folder = device, folder or scratch(checkpoint.folder)

    def perplexity(self, tokens: Tokens, ranks: Ranks = SINGLE) -> dict[str, Any]:
        """Return exp of the mean negative log likelihood of each token after a window's first.

        Each of ``ranks`` reads its share of the windows.

        Raises:
            ConfigError: The model is not a causal language model.
        """
        if not is_causal_language_model(self.model, self.stacks):
            raise ConfigError(
                f"{type(self.model).__name__}: perplexity needs a causal language model; "
                "leave [evaluate] out."
            )
        if tokens.ids.shape[1] < 2:
            raise ConfigError(
                "evaluate.data: the text is one token long; there is none to predict."
            )
        own = tokens.ids[ranks.shard(len(tokens.ids))]
        loss = sum(ranks.all_gather_object(self._loss(own) if len(own) else 0.0))
        count = tokens.ids[:, 1:].numel()
        return {
            "metric": "perplexity",
            "value": perplexity_of(loss, count),
            "tokens": count,
            "protocol": (
                f"{tokens.description}; {count} predicted tokens, the first of a window is not "
                f"predicted; token-weighted mean, float32 logits, "
                f"{str(self.weights.dtype).removeprefix('torch.')} blocks"
                + (", with the adapter that lies beside them" if self.weights.adapters else "")
            ),
        }

    def _loss(self, ids: Int[Tensor, "N T"]) -> float:
        parts = batches(ids, self.device)
        visit = last_visit(self, parts)
        with loaded_weights(self.weights, *heads(self.model)):
            return sum(
                negative_log_likelihood(visit.runner, window, labels)
                for hidden, part in zip(visit.hidden, parts, strict=True)
                for window, labels in zip(hidden, part, strict=True)
            )

    def answers(self, ids: Int[Tensor, "B T"]) -> Tensor:
        """Return what the model's head answers to tokens, in float32 on the CPU."""
        visit = last_visit(self, [ids.to(self.device)])
        with loaded_weights(self.weights, *heads(self.model)):
            return visit.runner.head(visit.hidden[0], visit.contexts[0]).float().cpu()


def last_visit(evaluator: Evaluator, parts: Sequence[Tensor]) -> LoadedBlock:
    """Walk to the end and return the last visit, whose hidden states are the last block's."""
    features = max(runner.features for runner in evaluator.stacks)
    nbytes = sum(part.numel() for part in parts) * features * evaluator.weights.dtype.itemsize
    place = hidden_states_factory(
        choose_offload(nbytes, evaluator.device), evaluator.device, evaluator.folder
    )
    visits = iterate_blocks(
        evaluator.model, evaluator.stacks, evaluator.weights, parts, shelf=place
    )
    visit = next(visits)
    for visit in visits:  # noqa: B007  the last one counts
        pass
    return visit


def negative_log_likelihood(
    runner: StackRunner, hidden: Float[Tensor, "T D"], ids: Int[Tensor, " T"]
) -> float:
    """Return the summed negative log likelihood of ``ids[1:]``, from float32 logits."""
    total = 0.0
    for start in range(0, len(ids) - 1, HEAD_TOKENS):
        end = min(start + HEAD_TOKENS, len(ids) - 1)
        logits = runner.head(hidden[None, start:end])[0].float()
        total += float(cross_entropy(logits, ids[start + 1 : end + 1], reduction="sum"))
    return total


def perplexity_of(loss: float, count: int) -> float:
    """Return exp(loss / count), infinite where that overflows."""
    try:
        return math.exp(loss / count)
    except OverflowError:
        return math.inf


def evaluate(
    path: str,
    sources: Sequence[str],
    length: int,
    windows: int | None,
    device: str = "auto",
    ranks: Ranks = SINGLE,
) -> list[dict[str, Any]]:
    """Return the perplexity of a checkpoint on each source, with the protocol of each.

    ``length`` is capped at what the model takes. The windows are split over ``ranks``.
    """
    checkpoint = open_checkpoint(find_checkpoint(path))
    evaluator = Evaluator(checkpoint, ranks.place(device_of(device)))
    length = min(length, longest(evaluator.model))
    tokenizer = load_tokenizer(checkpoint)
    results = []
    for source in sources:
        tokens = evaluation_tokens(tokenizer, [source], length, windows)
        results.append({"data": title(source), **evaluator.perplexity(tokens, ranks)})
    return results
