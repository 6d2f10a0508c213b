"""The modules outside of the blocks, in place of the model.

They are the final norms, the embeddings and the output head.
With y the output of the norm, ``Σ y · ∂L/∂y`` has the gradients of the loss L by everything before
the output head.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from prunekit.models.sequential.hidden_states import HiddenStates
from prunekit.structured.batches import Batch
from prunekit.structured.forward import Forward


@dataclass(frozen=True, eq=False)
class OutsideForward(Forward):
    """Runs the final norm of a stack on its last block's output.

    Attributes:
        modules: Modules outside of the blocks whose weights belong to this part.
        norm: The norm; None if no batch runs.
        hidden: Its input [B, T, D] for each batch.
        by_output: Gradients of the loss by its output, for each batch.
        predictions: Number of predictions of each sample, for each batch.
        numbers: Number of each batch, by its identity.
    """

    modules: frozenset[nn.Module]
    norm: nn.Module | None = None
    hidden: HiddenStates = field(default_factory=list)
    by_output: HiddenStates = field(default_factory=list)
    predictions: Sequence[Float[Tensor, " B"]] = ()
    numbers: Mapping[int, int] = field(default_factory=dict)

    @override
    @torch.no_grad()
    def run(self, batch: Batch) -> None:
        assert self.norm is not None
        self.norm(self.hidden[self.numbers[id(batch)]])

    @override
    def gradients(
        self, batch: Batch, tensors: Callable[[], Sequence[Tensor]]
    ) -> tuple[list[Tensor], Float[Tensor, " B"]]:
        assert self.norm is not None
        number = self.numbers[id(batch)]
        with torch.enable_grad():
            output = self.norm(self.hidden[number].detach().requires_grad_())
        found = torch.autograd.grad(output, tensors(), self.by_output[number])
        return [*found], self.predictions[number]

    @override
    def mean_losses(self, variants: Sequence[AbstractContextManager[Any]]) -> list[float]:
        raise TypeError("the loss is measured by a forward of all blocks")


@contextmanager
def outputs_of(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collect the outputs of a module, if any, within the context."""
    found: list[Tensor] = []

    def collect(_: nn.Module, __: object, output: Tensor) -> None:
        found.append(output)

    handles = [] if module is None else [module.register_forward_hook(collect)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
