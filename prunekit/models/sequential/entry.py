"""Hidden states of the first block of a stack, for each batch.

Shapes: B samples, T tokens, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.architectures.features import FEATURES, feature_shape
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.context import Context
from prunekit.models.sequential.hidden_states import HiddenStates, HiddenStatesFactory
from prunekit.models.sequential.kept_towers import KeptTowers
from prunekit.models.sequential.weights import Weights, loaded_weights
from prunekit.models.stock import random_features
from prunekit.models.vocabulary import input_embeddings

IMAGES = frozenset({"pixel_values", "image_patches"})
"""Inputs of which a batch with images has one."""
TEXT = frozenset({"input_ids", "token_type_ids", "decoder_input_ids", "labels"})
"""Inputs that the embeddings and blocks of a stack read by themselves."""


def is_image(batch: Mapping[str, Tensor]) -> bool:
    """Return whether a batch has images."""
    return bool(batch.keys() & IMAGES)


@dataclass
class Stream:
    """Inputs of the next block in one model, for each batch."""

    contexts: list[Context]
    hidden: HiddenStates = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """Makes the inputs of the first blocks of stacks.

    Attributes:
        model: The model.
        weights: Source of the weights, or None when the model has them.
        new_hidden_states: Makes empty storage for the hidden states of a stack.
        towers: Blocks of vision towers, which are dropped once the text has read their features.
    """

    model: PreTrainedModel
    weights: Weights | None
    new_hidden_states: HiddenStatesFactory
    towers: KeptTowers

    def embed(
        self,
        runner: StackRunner,
        batches: Sequence[Mapping[str, Tensor]],
        streams: Sequence[Stream],
    ) -> None:
        """Set the hidden states to the input of a stack's first block.

        Those of the dense model, which follow, are made with its own towers.

        Args:
            runner: The stack.
            batches: Its batches.
            streams: Hidden states of the pruned model, and perhaps of the dense one; changed.
        """
        for stream in streams:
            stream.hidden = self.new_hidden_states()
        tables = [] if runner.stack.reads_ids else input_embeddings(self.model, [runner.module])
        with loaded_weights(self.weights, *tables):
            self._fill(runner, batches, streams[0])
            for stream in streams[1:]:
                if self.towers.modules:
                    with self.towers.dense():
                        self._fill(runner, batches, stream)
                else:
                    _copy(streams[0], stream)
        for stream in streams if runner.stack.reads_ids else ():
            for batch, context in zip(batches, stream.contexts, strict=True):
                context["input_ids"] = self._tokens(batch, context)
        if not runner.stack.tower:
            self.towers.drop()

    def _fill(
        self, runner: StackRunner, batches: Sequence[Mapping[str, Tensor]], stream: Stream
    ) -> None:
        # Cloned: the input may be a view of another tensor.
        for batch, context in zip(batches, stream.contexts, strict=True):
            stream.hidden.extend([self._enter(runner, batch, context).clone()])

    def _enter(self, runner: StackRunner, batch: Mapping[str, Tensor], context: Context) -> Tensor:
        """Return the input of a stack's first block for a batch."""
        if runner.stack.features:
            return runner.record({FEATURES: self._features(runner, batch)}, context)
        if not (batch.keys() <= TEXT or context):
            return runner.record(batch, context)
        kinds = {name: batch[name] for name in ("token_type_ids",) if name in batch and not context}
        return runner.enter(self._tokens(batch, context), Context({**context, **kinds}))

    def _features(self, runner: StackRunner, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the features of a batch; random ones for text alone."""
        if FEATURES in batch:
            return batch[FEATURES]
        return random_features(batch["input_ids"], feature_shape(runner.module))

    def _tokens(self, batch: Mapping[str, Tensor], context: Context) -> Tensor:
        """Return the tokens that a stack reads.

        For a decoder that reads an encoder, the model makes them of ``labels``.
        """
        labelled = batch.keys() & {"decoder_input_ids", "labels"}
        if "encoder_hidden_states" not in context or not labelled:
            return batch["input_ids"]
        if "decoder_input_ids" in batch:
            return batch["decoder_input_ids"]
        shift: Any = getattr(self.model, "prepare_decoder_input_ids_from_labels")  # noqa: B009  of most
        return shift(labels=batch["labels"])


def _copy(stream: Stream, other: Stream) -> None:
    other.hidden.extend(map(torch.clone, stream.hidden))
    for context, known in zip(other.contexts, stream.contexts, strict=True):
        context.recorded = known.recorded
