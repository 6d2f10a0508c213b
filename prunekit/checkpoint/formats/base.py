"""How a pruned weight is stored.

Shapes: O output features, I input features.
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
"""What a weight becomes in a file, by the last part of its name: ``weight``, ``keep``, …"""


METHOD = "prunekit"
"""``quant_method`` of a ``config.json`` that transformers needs prunekit for."""


class Format(ABC):
    """A way of storing the weight of a linear layer, outputs first, and getting it back exactly.

    A part called ``weight`` never has the shape of the dense weight, unless it is the dense weight:
    so a program that does not know the format refuses the file instead of filling in random
    weights.

    Attributes:
        parts: Names of what a weight becomes, ``weight`` first.
        patterns: Names of the patterns that fit, or None if any does.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    patterns: ClassVar[tuple[str, ...] | None] = None

    @abstractmethod
    def why_not_storable(self, weight: Float[Tensor, "O I"]) -> str | None:
        """Say why this weight cannot be stored so, or had better not be; None if it can."""

    @abstractmethod
    def compress(self, weight: Float[Tensor, "O I"]) -> dict[str, Tensor]:
        """Return the parts of a weight that fits."""

    @abstractmethod
    def expand(self, parts: Parts, inputs: int) -> Float[Tensor, "O I"]:
        """Return the weight whose parts these are."""

    @abstractmethod
    def find_corruption(self, parts: Parts, shape: tuple[int, int]) -> str | None:
        """Say why parts read from a file are not those of a weight of this shape; None if sound."""

    def wrong_dtype(self, parts: Parts) -> str | None:
        """Say which part of those read from a file has not the type that :meth:`empty` gives it."""
        import torch

        values = parts["weight"].dtype
        if not values.is_floating_point:
            return f"values have type {values}"
        with torch.device("meta"):
            right = self.empty(Stored(1, 1, 1), values)
        wrong = [name for name, part in parts.items() if part.dtype != right[name].dtype]
        return f"{wrong[0]} has type {parts[wrong[0]].dtype}" if wrong else None

    @abstractmethod
    def empty(self, stored: Stored, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return parts of the right shapes and types, their contents undefined."""

    @abstractmethod
    def multiply(
        self, x: Float[Tensor, "T I"], parts: Parts, reach: int | None = None
    ) -> Float[Tensor, "T O"]:
        """Return ``x Wᵀ`` of the weight whose parts these are.

        ``reach``: with more tokens than this the weight is expanded first; None: where nothing was
        measured.
        """


@dataclass(frozen=True)
class Stored:
    """What ``config.json`` says of one compressed weight.

    Attributes:
        outputs: Rows of the weight.
        inputs: Columns.
        kept: Values stored, which is what its part ``weight`` holds.
        transposed: The model itself has the weight inputs first.
    """

    outputs: int
    inputs: int
    kept: int
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The shape that the model gives the weight."""
        return (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)

    def dump(self) -> list[Any]:
        """Return it as ``config.json`` has it; :meth:`Stored` of the same list is the way back."""
        return [self.outputs, self.inputs, self.kept, *([True] if self.transposed else [])]
