"""One block in place of the model, for rankers.

With y the output of the block, ``Σ y · ∂L/∂y`` has the gradients of the loss L by everything in the
block.

Shapes: B samples, T tokens, D features of the hidden states.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from prunekit.errors import CheckpointError
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.context import Context
from prunekit.models.sequential.hidden_states import HiddenStates, store
from prunekit.models.units.base import UnitGroup
from prunekit.models.units.blocks import BlockGroup
from prunekit.structured.batches import Batch
from prunekit.structured.forward import Forward

ENCODED = "encoder_hidden_states"
ADVICE = "Choose a ranker that needs no loss, such as obs or output-norm."
VARIANTS = 16
"""Variants of a block whose outputs are kept at once."""


@dataclass(frozen=True, eq=False)
class BlockInputs:
    """A block with its inputs for each batch.

    Attributes:
        runner: The stack of the block.
        index: Its number within the stack.
        hidden: Hidden states [B, T, D] of each batch.
        contexts: Further inputs of each batch.
    """

    runner: StackRunner
    index: int
    hidden: HiddenStates
    contexts: Sequence[Context]

    @property
    def module(self) -> nn.Module:
        """The block."""
        return self.runner.blocks[self.index]

    @torch.no_grad()
    def outputs(self, new: HiddenStates) -> HiddenStates:
        """Return the block's output for each batch, stored in ``new``."""
        for hidden, context in zip(self.hidden, self.contexts, strict=True):
            new.extend([self.runner.bind(self.index, hidden, context)()])
        return new


@dataclass
class LossGradients:
    """Gradients of the loss, summed over the predictions of each batch.

    Attributes:
        by_output: Gradients by the output of the current block, for each batch.
        by_input: Those by its input, as far as they are computed.
        by_encoded: Those by the output of the encoder that the current stack reads, by batch.
        by_norm: Those by the output of the final norm, for each batch, if they are wanted.
        predictions: Number of predictions of each sample, for each batch.
    """

    by_output: HiddenStates
    by_input: HiddenStates
    predictions: list[Float[Tensor, " B"]]
    by_encoded: dict[int, Tensor] = field(default_factory=dict)
    by_norm: HiddenStates = field(default_factory=list)

    def propagate(self) -> None:
        """Turn gradients by the input into those of the previous block's output."""
        self.by_output, self.by_input = self.by_input, self.by_output


@dataclass(frozen=True, eq=False)
class BlockForward(Forward):
    """Runs one loaded block on its inputs.

    Attributes:
        inputs: The block and its inputs.
        numbers: Number of each batch, by its identity.
        loss: Gradients of the loss, if a ranker needs it.
        mean_losses_after: Returns the mean loss for each variant of the block's outputs.
    """

    inputs: BlockInputs
    numbers: Mapping[int, int]
    loss: LossGradients | None = None
    mean_losses_after: Callable[..., list[float]] | None = None
    _propagated: set[int] = field(default_factory=set, init=False)

    @property
    def modules(self) -> frozenset[nn.Module]:
        """The block and all modules in it."""
        return frozenset(self.inputs.module.modules())

    @override
    def units(self, group: UnitGroup) -> Sequence[int]:
        """Return what of a group is in the block, or the group."""
        return [self.inputs.index] if isinstance(group, BlockGroup) else super().units(group)

    @override
    @torch.no_grad()
    def run(self, batch: Batch) -> None:
        number, inputs = self.numbers[id(batch)], self.inputs
        inputs.runner.bind(inputs.index, inputs.hidden[number], inputs.contexts[number])()

    @override
    def gradients(
        self, batch: Batch, tensors: Callable[[], Sequence[Tensor]]
    ) -> tuple[list[Tensor], Float[Tensor, " B"]]:
        assert self.loss is not None
        number = self.numbers[id(batch)]
        return self._gradients(number, tensors), self.loss.predictions[number]

    @override
    def mean_losses(self, variants: Sequence[AbstractContextManager[Any]]) -> list[float]:
        assert self.mean_losses_after is not None
        found: list[float] = []
        for start in range(0, len(variants), VARIANTS):
            found += self.mean_losses_after(self.inputs, variants[start : start + VARIANTS])
        return found

    def propagate(self) -> None:
        """Propagate the gradients to the input for batches that no ranker ran."""
        assert self.loss is not None
        for number in sorted({*self.numbers.values()} - self._propagated):
            self._gradients(number, list)
        self.loss.propagate()

    def _gradients(self, number: int, tensors: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """Return gradients in a batch, once those by the block's inputs too."""
        loss, inputs = self.loss, self.inputs
        assert loss is not None
        hidden, context = inputs.hidden[number].detach(), copy(inputs.contexts[number])
        leaves: list[Tensor] = []
        if number not in self._propagated:
            leaves.append(hidden.requires_grad_())
            if ENCODED in context:
                context[ENCODED] = context[ENCODED].detach().requires_grad_()
                leaves.append(context[ENCODED])
        with torch.enable_grad():
            output = inputs.runner.bind(inputs.index, hidden, context)()
        if leaves and not number:
            self._check_hidden_states_alone(hidden, context)
        wanted = [*tensors(), *leaves]
        # Of the encoder's output None: not every block of a decoder reads it.
        found = torch.autograd.grad(output, wanted, loss.by_output[number], allow_unused=True)
        if leaves:
            self._keep(number, found[-len(leaves) :])
        own = found[: len(found) - len(leaves)]
        return [
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(wanted, own, strict=False)
        ]

    def _check_hidden_states_alone(self, hidden: Tensor, context: Context) -> None:
        """Refuse a block with other outputs through which gradients flow.

        Raises:
            CheckpointError: Its keys, or its further outputs, reach later blocks.
        """
        names = sorted(context.shared)
        for value in context.tails.get(self.inputs.index) or ():
            follows = isinstance(value, Tensor) and value.requires_grad
            if follows and _depends(value, hidden):
                names.append("further outputs")
        if names:
            raise CheckpointError(
                f"{self.inputs.runner.names[self.inputs.index]}: it also hands "
                f"{' and '.join(dict.fromkeys(names))} to later blocks, and gradients are not "
                f"followed through that. {ADVICE}"
            )

    def _keep(self, number: int, found: Sequence[Tensor | None]) -> None:
        """Keep the gradients by the inputs of the block."""
        loss, (by_hidden, *by_encoded) = self.loss, found
        assert loss is not None
        assert by_hidden is not None
        self._propagated.add(number)
        if number < len(loss.by_input):
            store(loss.by_input, number, by_hidden)
        else:
            loss.by_input.extend([by_hidden])
        for each in by_encoded:
            if each is not None:
                known = loss.by_encoded.get(number)
                loss.by_encoded[number] = each if known is None else known + each


def _depends(value: Tensor, on: Tensor) -> bool:
    """Return whether a gradient flows from a tensor to another."""
    (found,) = torch.autograd.grad(value.sum(), on, retain_graph=True, allow_unused=True)
    return found is not None
