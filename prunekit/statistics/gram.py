"""Gram matrix: XᵀX, everything a layer's reconstruction error depends on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from typing_extensions import override

from prunekit.statistics.base import S, Statistic
from prunekit.statistics.column_energy import ColumnEnergy

if TYPE_CHECKING:
    from torch import Tensor

PANEL = 256
NOISE = 0.5


class Gram(Statistic):
    """``total = Σₜ x[t] x[t]ᵀ`` (Frantar & Alistarh, arXiv:2301.00774, §3, less a factor)."""

    name: ClassVar[str] = "gram"
    _mirrored = False
    # What was laid aside: its diagonal while it lies there, itself once it had to go elsewhere.
    _diagonal: Tensor | None = None
    _aside: Tensor | None = None

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
        yield from lower_panels(self.total)

    @property
    def full(self) -> Float[Tensor, "I I"]:
        """The sum with its upper triangle mirrored, in place; asked for when all is added."""
        from prunekit_kernels import mirror

        if not self._mirrored:
            self._aside = self._leave()
            mirror(self.total)
            self._mirrored = True
        return self.total

    @property
    def noise(self) -> float:
        """How much of the sum is chance, as a fraction of its mean diagonal; 0 of no tokens.

        It is half of the inputs a token. What is solved by the sum has to be damped by that, as in
        any ridge regression.
        """
        return NOISE * len(self.total) / self.tokens if self.tokens else 0.0

    def stash_upper(self, upper: Float[Tensor, "I I"]) -> None:
        """Keep an upper triangular matrix in the half of the sum that says nothing."""
        self._diagonal, self._mirrored = upper.diagonal().clone(), False
        for start in range(0, len(upper), PANEL):
            end = start + PANEL
            self.total[start:end, end:] = upper[start:end, end:]
            square = self.total[start:end, start:end]
            square.copy_(square.tril() + upper[start:end, start:end].triu(1))

    def pop_upper(self) -> Float[Tensor, "I I"] | None:
        """Return what was laid aside, in memory of its own, if anything was."""
        found, self._aside = self._leave() if self._aside is None else self._aside, None
        return found

    def _leave(self) -> Float[Tensor, "I I"] | None:
        if self._diagonal is None:
            return None
        upper = self.total.triu(1)
        upper.diagonal().copy_(self._diagonal)
        self._diagonal = None
        return upper

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


def lower_panels(square: Float[Tensor, "I I"]) -> Iterator[Float[Tensor, "R C"]]:
    """Yield the lower triangle in panels of rows, as views."""
    for start in range(0, len(square), PANEL):
        yield square[start : start + PANEL, : start + PANEL]
