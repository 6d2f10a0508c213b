"""Base class of storage formats, and the layout of a compressed weight.

Shapes: O output features, I input features, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from jaxtyping import Float

from prunekit.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Parts = Mapping[str, "Tensor"]
"""Stored tensors of a weight, by the last part of their names: ``weight``, ``keep``, …"""

QUANT_METHOD = "prunekit"
"""``quant_method`` in ``config.json`` of checkpoints that transformers opens by prunekit only."""
MAX_WEIGHTS = 2**56
"""Most weights of a layout: the sizes of all its parts in bytes fit 63 bits."""


class Sized(Protocol):
    """A tensor, or its entry in the header of a file."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes along the dimensions."""
        ...


class Format(ABC):
    """Lossless storage format for the weight of a linear layer, outputs first.

    The part ``weight`` never has the shape of the dense weight unless it is the dense weight, so a
    program that does not know the format fails on the shape instead of using random weights.

    Attributes:
        name: Name in configs.
        parts: Names of the stored tensors, ``weight`` first.
        patterns: Names of the patterns that the format can store; None: any.
        typed_by: The part whose type is that of the dense weight.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    patterns: ClassVar[tuple[str, ...] | None] = None
    typed_by: ClassVar[str] = "weight"

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

    def find_corruption(self, parts: Parts, layout: WeightLayout) -> str | None:
        """Return why stored parts are no weight of a layout, or None.

        Parts without a finding can be expanded. Changes that make another valid weight are not
        found: other values, or values or bits in another order with the same counts.

        Args:
            parts: Stored tensors; on the meta device only their dtypes and shapes are checked.
            layout: Layout of the weight.
        """
        if problem := self.find_mismatch(parts, layout):
            return problem
        if any(part.is_meta for part in parts.values()):
            return None
        return self.find_contradiction(parts, layout)

    def find_mismatch(self, parts: Mapping[str, Sized], layout: WeightLayout) -> str | None:
        """Return which part is missing or has another dtype or shape.

        None if all parts fit. No values are read, so headers can be checked before anything is
        allocated.

        Args:
            parts: Stored tensors or their headers.
            layout: Layout of the weight.
        """
        import torch

        from prunekit.checkpoint.header import FLOAT_DTYPES

        if missing := [part for part in self.parts if part not in parts]:
            return f"its part {missing[0]} is missing"
        dtype = parts[self.typed_by].dtype
        if dtype not in FLOAT_DTYPES:
            what = "values have" if self.typed_by == "weight" else f"{self.typed_by} has"
            return f"{what} type {dtype}"
        with torch.device("meta"):
            expected = self.empty(layout, dtype)
        for name, part in expected.items():
            if parts[name].dtype != part.dtype:
                return f"{name} has type {parts[name].dtype} instead of {part.dtype}"
            if tuple(parts[name].shape) != part.shape:
                found, size = list(parts[name].shape), list(layout.shape)
                return f"{name} has shape {found}; a weight of {size} needs {list(part.shape)}"
        if (values := expected["weight"].numel()) != layout.value_count:
            return f"there are {values} values instead of {layout.value_count}"
        return None

    @abstractmethod
    def find_contradiction(self, parts: Parts, layout: WeightLayout) -> str | None:
        """Return how values, bits and offsets contradict each other, or None.

        Args:
            parts: Stored tensors with the dtypes and shapes of :meth:`empty`.
            layout: Layout of the weight.
        """

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
        """Return the list for ``config.json``, which :meth:`load` reads."""
        return [self.outputs, self.inputs, self.value_count, *([True] if self.transposed else [])]

    @classmethod
    def load(cls, entry: object, where: str) -> WeightLayout:
        """Return the layout that :meth:`dump` listed.

        Args:
            entry: The list.
            where: Name of the weight or layer, for messages.

        Raises:
            CheckpointError: It is no such list, or no weight can have this layout.
        """
        sizes, flags = (entry[:3], entry[3:]) if isinstance(entry, list) else ([], [])
        if (
            [type(size) for size in sizes] != [int] * 3
            or [type(flag) for flag in flags] not in ([], [bool])
            or not 0 <= min(sizes) <= max(sizes) <= MAX_WEIGHTS
            or not sizes[2] <= sizes[0] * sizes[1] <= MAX_WEIGHTS
        ):
            raise CheckpointError(
                f"{where}: {shortened(entry)} is not the layout of a compressed weight: "
                "[outputs, inputs, stored values]"
            )
        return cls(*sizes, *flags)
