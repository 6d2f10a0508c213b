"""Perplexity of a checkpoint, block by block, for models larger than memory.

All windows pass through a block before the next one is loaded, so a device holds one block at a
time. With several ranks, each evaluates its shard of the windows. A device map of the whole model
would make each device wait for the previous one and reload offloaded weights for every batch.

Shapes: N windows, T tokens, B windows of a batch, D features, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from prunekit.architectures import find_architecture
from prunekit.checkpoint.hub import checkpoint_folder
from prunekit.checkpoint.reader import Checkpoint, open_checkpoint
from prunekit.data.sources import title
from prunekit.data.tokens import Tokens, evaluation_tokens
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError, NumericsError
from prunekit.models.devices import loss_dtype, resolve_device, stored_dtype
from prunekit.models.empty_model import empty_model, max_tokens
from prunekit.models.layout import is_causal_language_model, stack_runners
from prunekit.models.memory import report_exhausted
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.hidden_states import choose_offload, hidden_states_factory, scratch
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.models.sequential.pipeline import iterate_blocks, split_batches
from prunekit.models.sequential.weights import Weights, loaded_weights
from prunekit.models.vocabulary import load_tokenizer, output_heads, token_limit

HEAD_TOKENS = 256
"""Positions whose logits are computed at once; the float32 logits of a whole window can be larger
than the model."""


class Evaluator:
    """Evaluate a checkpoint on one device, block by block.

    Hidden states that do not fit into memory are offloaded to an unlinked file in ``folder``: the
    output folder of a run, or by default the checkpoint's own folder, whose disk has space for a
    model.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, folder: Path | None = None
    ) -> None:
        self.model = empty_model(checkpoint)
        self.stacks = stack_runners(self.model, find_architecture(self.model))
        dtype = loss_dtype(stored_dtype(checkpoint), device)
        # As transformers does, which multiplies codes and scales in the type in which it runs.
        checkpoint = replace(checkpoint, expands_to=dtype)
        self.weights = Weights(self.model, checkpoint, dtype, device)
        self.device, self.folder = device, folder or scratch(checkpoint.folder)

    def perplexity(self, tokens: Tokens, ranks: Ranks = SINGLE) -> dict[str, Any]:
        """Return exp(mean negative log-likelihood) with its protocol.

        The first token of a window is not predicted; of windows that overlap, each token is
        predicted once, with the longest context. Each rank evaluates its shard of the windows.

        Raises:
            ConfigError: The model is not a causal language model, or windows have one token.
            NumericsError: The loss is NaN or inf.
        """
        if not is_causal_language_model(self.model, self.stacks):
            raise ConfigError(
                f"{type(self.model).__name__}: perplexity needs a causal language model; "
                "leave [evaluate] out."
            )
        if tokens.ids.shape[1] < 2:
            raise ConfigError(
                "evaluate.data: the text is one token long; there is no token to predict."
            )
        shard = ranks.shard(len(tokens.ids))
        own, length = tokens.ids[shard], tokens.longest
        # Of a window after the first, the tokens that the one before has are context alone.
        seen = length - tokens.stride if tokens.stride else 1
        predicted = [length - (seen if n else 1) for n in range(len(tokens.ids))]
        loss = sum(ranks.all_gather_object(self._loss(own, predicted[shard]) if len(own) else 0.0))
        count = sum(predicted)
        if not math.isfinite(loss):
            raise NumericsError(
                f"{self.folder}: the loss of {type(self.model).__name__} is {loss}. Its weights "
                f"are finite, so its hidden states overflow in {self.weights.dtype}."
            )
        return {
            "metric": "perplexity",
            "value": perplexity_from_loss(loss, count),
            "tokens": count,
            "protocol": (
                f"{tokens.description}; {count} predicted tokens, {self._unpredicted(tokens)}; "
                "token-weighted mean, float32 logits, "
                f"{str(self.weights.dtype).removeprefix('torch.')} blocks"
                + (", with the adapter that lies beside them" if self.weights.adapters else "")
            ),
        }

    @staticmethod
    def _unpredicted(tokens: Tokens) -> str:
        """Return which tokens of a window are not predicted, in words."""
        if tokens.stride is None:
            return "the first of a window is not predicted"
        return "not the very first, nor in a window those that the one before has"

    def _loss(self, ids: Int[Tensor, "N T"], predicted: Sequence[int]) -> float:
        """Return the summed loss of the last tokens of each window."""
        parts = split_batches(ids, self.device)
        block = run_blocks(self, parts)
        with loaded_weights(self.weights, *output_heads(self.model)):
            windows = (
                each
                for hidden, part in zip(block.hidden, parts, strict=True)
                for each in zip(hidden, part, strict=True)
            )
            return sum(
                negative_log_likelihood(block.runner, window[-count - 1 :], labels[-count - 1 :])
                for (window, labels), count in zip(windows, predicted, strict=True)
            )

    def outputs(self, ids: Int[Tensor, "B T"]) -> Tensor:
        """Return the outputs of the model's head in float32 on the CPU."""
        block = run_blocks(self, [ids.to(self.device)])
        with loaded_weights(self.weights, *output_heads(self.model)):
            return block.runner.head(block.hidden[0], block.contexts[0]).float().cpu()


def run_blocks(evaluator: Evaluator, parts: Sequence[Tensor | Mapping[str, Tensor]]) -> LoadedBlock:
    """Run all blocks; return the last one, with its output hidden states."""
    features = max(runner.features for runner in evaluator.stacks)
    tokens = sum(
        part.numel() if isinstance(part, Tensor) else max(each.numel() for each in part.values())
        for part in parts
    )
    nbytes = tokens * features * evaluator.weights.dtype.itemsize
    factory = hidden_states_factory(
        choose_offload(nbytes, evaluator.device), evaluator.device, evaluator.folder
    )
    blocks = iterate_blocks(
        evaluator.model, evaluator.stacks, evaluator.weights, parts, new_hidden_states=factory
    )
    block = next(blocks)
    for block in blocks:  # noqa: B007  only the last one is used
        pass
    return block


def negative_log_likelihood(
    runner: StackRunner, hidden: Float[Tensor, "T D"], ids: Int[Tensor, " T"]
) -> float:
    """Return the summed negative log-likelihood of ``ids[1:]`` in nats.

    Args:
        runner: Runner of the stack, with the output head loaded.
        hidden: Final hidden states of one window.
        ids: Tokens of the window; logits are computed in float32.
    """
    total = 0.0
    for start in range(0, len(ids) - 1, HEAD_TOKENS):
        end = min(start + HEAD_TOKENS, len(ids) - 1)
        logits = runner.head(hidden[None, start:end])[0].float()
        total += float(cross_entropy(logits, ids[start + 1 : end + 1], reduction="sum"))
    return total


def perplexity_from_loss(loss: float, count: int) -> float:
    """Return exp(loss / count), or infinity on overflow."""
    try:
        return math.exp(loss / count)
    except OverflowError:
        return math.inf


@report_exhausted()
def evaluate(  # noqa: PLR0913  independent options
    path: str,
    sources: Sequence[str],
    length: int,
    windows: int | None,
    device: str = "auto",
    ranks: Ranks = SINGLE,
    *,
    stride: int | None = None,
) -> list[dict[str, Any]]:
    """Return the perplexity of a checkpoint on each source, with its protocol.

    Args:
        path: Folder or name of the checkpoint.
        sources: Text sources as in a config.
        length: Tokens per window, capped at the model's maximum sequence length.
        windows: Number of windows; None for all.
        device: Device as in a config.
        ranks: Ranks over which the windows are sharded.
        stride: Tokens from the start of a window to that of the next; None: they do not overlap.
    """
    asked = {"model": path, "data": [*sources], "length": length, "windows": windows}
    asked |= {"stride": stride}
    ranks.require_same({"job": "evaluate", **asked})
    checkpoint = open_checkpoint(checkpoint_folder(path))
    ranks.require_same({"config.json": checkpoint.config})
    evaluator = Evaluator(checkpoint, ranks.local_device(resolve_device(device)))
    length = min(length, max_tokens(evaluator.model))
    tokenizer = load_tokenizer(checkpoint)
    limit = token_limit(evaluator.model, [runner.module for runner in evaluator.stacks])
    results = []
    for source in sources:
        tokens = evaluation_tokens(tokenizer, [source], length, windows, stride=stride, limit=limit)
        ranks.require_same({"tokens": {source: tokens.digest}})
        results.append({"data": title(source), **evaluator.perplexity(tokens, ranks)})
    return results
