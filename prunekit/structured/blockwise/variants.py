"""Runs variants of a model from one block on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from prunekit.models.sequential.context import Context
from prunekit.models.sequential.hidden_states import HiddenStates, store
from prunekit.models.sequential.weights import loaded_weights
from prunekit.structured.blockwise.block_forward import ENCODED, BlockInputs

if TYPE_CHECKING:
    from prunekit.models.sequential.block_runner import StackRunner
    from prunekit.structured.blockwise.block_passes import BlockPasses


@dataclass
class Variant:
    """A variant of the model, with the hidden states it has reached.

    Attributes:
        gates: Context manager under which it runs; entered once for each block.
        hidden: Output of the last block that ran, for each batch.
        contexts: Further inputs of the next block, for each batch.
    """

    gates: AbstractContextManager[Any]
    hidden: HiddenStates
    contexts: Sequence[Context]


@dataclass(frozen=True)
class Rest:
    """Runs the blocks after one, for several variants of the model.

    Attributes:
        passes: The passes over the model.
        kept: Inputs of all of its blocks.
    """

    passes: BlockPasses
    kept: Sequence[BlockInputs]

    def mean_losses(
        self, inputs: BlockInputs, variants: Sequence[AbstractContextManager[Any]]
    ) -> list[float]:
        """Return the mean loss of each variant, run from a block on.

        Args:
            inputs: The block, which is loaded, and its inputs.
            variants: Context managers under which it and later blocks run.
        """
        found = []
        for gates in variants:
            with gates:
                outputs = inputs.outputs(self.passes.new_hidden_states())
            found.append(Variant(gates, outputs, inputs.contexts))
        later = self.kept[self.kept.index(inputs) + 1 :]
        for before, block in zip([inputs, *later], later, strict=False):
            if block.runner is not before.runner:
                for variant in found:
                    self._enter_decoder(variant, before.runner, block)
            with loaded_weights(self.passes.weights, block.module):
                for variant in found:
                    with variant.gates:
                        _advance(block, variant)
        return self.passes.mean_losses(found)

    def _enter_decoder(self, variant: Variant, encoder: StackRunner, block: BlockInputs) -> None:
        with variant.gates:
            variant.contexts = [
                Context({ENCODED: encoder.finish(hidden.detach(), context)})
                for hidden, context in zip(variant.hidden, variant.contexts, strict=True)
            ]
        variant.hidden = self.passes.new_hidden_states()
        variant.hidden.extend(map(torch.clone, block.hidden))


@torch.no_grad()
def _advance(block: BlockInputs, variant: Variant) -> None:
    """Replace hidden states by the output of a block."""
    for number, context in enumerate(variant.contexts):
        call = block.runner.bind(block.index, variant.hidden[number], context)
        store(variant.hidden, number, call())
