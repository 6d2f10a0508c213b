"""Base class of storage formats, and the layout of a compressed weight.

Shapes: O output features, I input features, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Parts = Mapping[str, "Tensor"]
"""Stored tensors of a weight, by the last part of their names: ``weight``, ``keep``, …"""


QUANT_METHOD = "prunekit"
"""``quant_method`` in ``config.json`` of checkpoints that transformers opens by prunekit only."""


class Format(ABC):
    """Lossless storage format for the weight of a linear layer, outputs first.

    The part ``weight`` never has the shape of the dense weight unless it is the dense weight, so a
    program that does not know the format fails on the shape instead of using random weights.

    Attributes:
        name: Name in configs.
        parts: Names of the stored tensors, ``weight`` first.
        patterns: Names of the patterns that the format can store; None: any.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    patterns: ClassVar[tuple[str, ...] | None] = None

    @abstractmethod
    def why_not_storable(self, weight: Float[Tensor, "O I"]) -> str | None:
        """Return why the format should not store a weight, or None."""

    @abstractmethod
    def compress(self, weight: Float[Tensor, "O I"]) -> dict[str, Tensor]:
        """Return the parts of a weight that the format can store."""

    @abstractmethod
    def expand(self, parts: Parts, inputs: int) -> Float[Tensor, "O I"]:
        """Return the dense weight.

        Args:
            parts: Stored tensors.
            inputs: Number of columns I.
        """

    @abstractmethod
    def find_corruption(self, parts: Parts, shape: tuple[int, int]) -> str | None:
        """Return why stored parts are invalid for a shape, or None.

        Args:
            parts: Stored tensors.
            shape: Shape (O, I) of the weight.
        """

    def wrong_dtype(self, parts: Parts) -> str | None:
        """Return which part has another dtype than in :meth:`empty`, or None."""
        import torch

        values = parts["weight"].dtype
        if not values.is_floating_point:
            return f"values have type {values}"
        with torch.device("meta"):
            expected = self.empty(WeightLayout(1, 1, 1), values)
        wrong = [name for name, part in parts.items() if part.dtype != expected[name].dtype]
        return f"{wrong[0]} has type {parts[wrong[0]].dtype}" if wrong else None

    @abstractmethod
    def empty(self, layout: WeightLayout, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return uninitialized parts for a weight of this layout and dtype."""

    @abstractmethod
    def multiply(
        self, x: Float[Tensor, "T I"], parts: Parts, max_kernel_tokens: int | None = None
    ) -> Float[Tensor, "T O"]:
        """Return ``x Wᵀ``.

        Args:
            x: Inputs.
            parts: Stored tensors of W.
            max_kernel_tokens: With more tokens than this, W is expanded and multiplied dense; None:
                not measured, the kernel's default applies.
        """


@dataclass(frozen=True)
class WeightLayout:
    """Entry of ``config.json`` for one compressed weight.

    Attributes:
        outputs: Rows of the weight.
        inputs: Columns of the weight.
        value_count: Number of stored values, the size of the part ``weight``.
        transposed: The model has the weight inputs first (Conv1D).
    """

    outputs: int
    inputs: int
    value_count: int
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight in the model."""
        return (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)

    def dump(self) -> list[Any]:
        """Return the list for ``config.json``; ``WeightLayout(*list)`` restores it."""
        return [self.outputs, self.inputs, self.value_count, *([True] if self.transposed else [])]
