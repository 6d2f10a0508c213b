"""How batches run: through the whole model, or one block.

Shapes: B samples of a batch, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from prunekit.distributed.ranks import SINGLE, Ranks

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedModel

    from prunekit.models.units.base import UnitGroup
    from prunekit.structured.batches import Batch


class Forward(ABC):
    """Runs batches, for hooks, for gradients, or for the loss."""

    @abstractmethod
    def run(self, batch: Batch) -> None:
        """Run a batch without gradients, for the hooks of the model."""

    @abstractmethod
    def gradients(
        self, batch: Batch, tensors: Callable[[], Sequence[Tensor]]
    ) -> tuple[list[Tensor], Float[Tensor, " B"]]:
        """Return gradients of a batch's loss, summed over its predictions.

        Args:
            batch: The batch to run.
            tensors: Returns the tensors that are differentiated; called after the forward.

        Returns:
            Their gradients, and the number of predictions of each sample.
        """

    def units(self, group: UnitGroup) -> Sequence[int]:
        """Return the units of a group that this forward runs."""
        return range(group.units)

    @abstractmethod
    def mean_losses(self, variants: Sequence[AbstractContextManager[Any]]) -> list[float]:
        """Return the mean loss over all batches of all ranks.

        ``variants``: context managers in which it is measured, each once.
        """


@dataclass(frozen=True)
class WholeModel(Forward):
    """Runs the whole model, which is in memory.

    Attributes:
        model: The model.
        batches: Batches of this rank, for the mean loss.
        ranks: Processes that have the other batches.
    """

    model: PreTrainedModel
    batches: Sequence[Batch] = ()
    ranks: Ranks = SINGLE

    @override
    def run(self, batch: Batch) -> None:
        import torch

        with torch.no_grad():
            self.model(**batch)

    @override
    def gradients(
        self, batch: Batch, tensors: Callable[[], Sequence[Tensor]]
    ) -> tuple[list[Tensor], Float[Tensor, " B"]]:
        import torch

        from prunekit.structured.batches import losses

        with torch.enable_grad():
            loss, predictions = losses(self.model, batch)
            return [*torch.autograd.grad(loss.sum(), tensors())], predictions

    @override
    def mean_losses(self, variants: Sequence[AbstractContextManager[Any]]) -> list[float]:
        from prunekit.structured.batches import mean_loss

        found = []
        for variant in variants:
            with variant:
                found.append(mean_loss(self.model, self.batches, self.ranks))
        return found
