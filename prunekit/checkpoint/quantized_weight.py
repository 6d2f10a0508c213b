"""A weight of a checkpoint, stored in few bits with scales."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from prunekit.checkpoint.header import TensorEntry

DENSE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that is stored in few bits.

    Attributes:
        values: Name of the stored numbers.
        scales: Name of the stored scales.
        shape: Shape of the dense weight.
        expand: Returns the dense weight of both, in the type of its entry or a wider one.
        dtype: Type of its entry, as which it is read.
        metadata: Names of stored tensors that only describe it.
    """

    values: str
    scales: str
    shape: tuple[int, ...]
    expand: Callable[[Tensor, Tensor], Tensor]
    dtype: torch.dtype = DENSE_DTYPE
    metadata: tuple[str, ...] = ()

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of all its stored tensors."""
        return self.values, self.scales, *self.metadata

    def dense(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weight.

        Args:
            tensors: Stored tensors by name.
            dtype: Its type; None for that of its entry.
        """
        expanded = self.expand(tensors[self.values], tensors[self.scales])
        return expanded.to(dtype or self.dtype)

    def entry(self, files: Mapping[str, TensorEntry]) -> TensorEntry:
        """Return the entry of the dense weight."""
        size = prod(self.shape) * self.dtype.itemsize
        return TensorEntry(files[self.values].file, self.dtype, self.shape, size)
