"""Cross Gram matrix of the input difference between dense and pruned model.

The inputs are subtracted before they are multiplied: products of small differences lose little in
the compute type, whereas two Gram matrices subtracted from each other would.

Shapes: T tokens, I input features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from typing_extensions import override

from prunekit.statistics.base import Statistic

if TYPE_CHECKING:
    from torch import Tensor


class CrossGram(Statistic):
    """``total = Σₜ (dense[t] − x[t]) x[t]ᵀ``; zero where no dense model runs too."""

    name: ClassVar[str] = "cross"

    @classmethod
    @override
    def shape(cls, inputs: int) -> tuple[int, ...]:
        return (inputs, inputs)

    @override
    def add(self, x: Float[Tensor, "T I"]) -> None:
        pass  # without a dense model its inputs are taken to be the same

    def update_pair(self, x: Float[Tensor, "T I"], dense: Float[Tensor, "T I"]) -> None:
        """Add the inputs of tokens in the pruned and the dense model."""
        self.tokens += x.shape[0]
        self.add_pair(x, dense)

    def add_pair(self, x: Float[Tensor, "T I"], dense: Float[Tensor, "T I"]) -> None:
        """Add the products of rows of ``dense - x`` and ``x`` to ``total``."""
        from prunekit_kernels import cross_gram

        cross_gram(dense - x, x, self.total)
