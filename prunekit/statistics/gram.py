"""Gram matrix: XᵀX, everything a layer's reconstruction error depends on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from typing_extensions import override

from prunekit.statistics.base import S, Statistic
from prunekit.statistics.column_energy import ColumnEnergy

if TYPE_CHECKING:
    from torch import Tensor

PANEL = 256


class Gram(Statistic):
    """``total = Σₜ x[t] x[t]ᵀ`` (Frantar & Alistarh, arXiv:2301.00774, §3, less a factor)."""

    name: ClassVar[str] = "gram"

    @classmethod
    @override
    def shape(cls, inputs: int) -> tuple[int, ...]:
        return (inputs, inputs)

    @classmethod
    @override
    def flops(cls, inputs: int) -> int:
        return inputs**2  # of a symmetric matrix one half

    @override
    def add(self, x: Float[Tensor, "T I"]) -> None:
        from prunekit_kernels import gram

        gram(x, self.total)

    @override
    def parts(self) -> Iterator[Float[Tensor, "R C"]]:
        """Yield the lower triangle in panels of rows: I (I + PANEL) / 2 numbers, not I²."""
        for start in range(0, len(self.total), PANEL):
            end = min(start + PANEL, len(self.total))
            yield self.total[start:end, :end]

    @cached_property
    def full(self) -> Float[Tensor, "I I"]:
        """The sum with its upper triangle mirrored, in place; asked for when all is added."""
        from prunekit_kernels import mirror

        return mirror(self.total)

    @classmethod
    @override
    def contains(cls) -> frozenset[type[Statistic]]:
        return frozenset({ColumnEnergy})

    @override
    def derive(self, kind: type[S]) -> S | None:
        if kind is not ColumnEnergy:
            return None
        energy = ColumnEnergy(self.total.shape[0], self.total.device)
        energy.tokens, energy.total = self.tokens, self.total.diagonal().clone()
        return energy  # pyright: ignore[reportReturnType]

    @override
    def finite(self) -> bool:
        # A column that is not finite shows on the diagonal.
        return bool(self.total.diagonal().isfinite().all())
