"""Gram matrix XᵀX, which determines the reconstruction error of a layer.

Shapes: T tokens, I input features, R × C a panel of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Bool, Float
from typing_extensions import override

from prunekit.statistics.base import S, Statistic
from prunekit.statistics.column_energy import ColumnEnergy

if TYPE_CHECKING:
    from torch import Tensor

PANEL = 256
"""Rows of a panel of the lower triangle."""
NOISE = 0.5
"""Noise of the sum, as a fraction of its mean diagonal, at one token per input."""


class Gram(Statistic):
    """``total = Σₜ x[t] x[t]ᵀ`` (Frantar & Alistarh, arXiv:2301.00774, §3, less a factor)."""

    name: ClassVar[str] = "gram"
    _mirrored = False
    # A stashed triangle: its diagonal while the rest is in `total`; all of it once `total` has its
    # own upper triangle again.
    _stashed_diagonal: Tensor | None = None
    _stashed: Tensor | None = None

    @classmethod
    @override
    def shape(cls, inputs: int) -> tuple[int, ...]:
        return (inputs, inputs)

    @classmethod
    @override
    def flops(cls, inputs: int) -> int:
        return inputs**2  # one half of a symmetric matrix

    @override
    def add(self, x: Float[Tensor, "T I"]) -> None:
        from prunekit_kernels import gram

        gram(x, self.total)

    @override
    def parts(self) -> Iterator[Float[Tensor, "R C"]]:
        """Yield the lower triangle in panels: about half of the matrix."""
        yield from lower_panels(self.total)

    @property
    def full(self) -> Float[Tensor, "I I"]:
        """The sum with both triangles, mirrored in place after all updates."""
        from prunekit_kernels import mirror

        if not self._mirrored:
            self._stashed = self._remove_stashed()
            mirror(self.total)
            self._mirrored = True
        return self.total

    @property
    def noise(self) -> float:
        """Sampling noise as a fraction of the mean diagonal; 0 without tokens.

        It is half of the number of inputs per token. Solutions need at least that much damping, as
        in any ridge regression.
        """
        return NOISE * len(self.total) / self.tokens if self.tokens else 0.0

    def stash_upper(self, upper: Float[Tensor, "I I"]) -> None:
        """Store an upper triangular matrix in the redundant half of the sum."""
        self._stashed_diagonal, self._mirrored = upper.diagonal().clone(), False
        for start in range(0, len(upper), PANEL):
            end = start + PANEL
            self.total[start:end, end:] = upper[start:end, end:]
            square = self.total[start:end, start:end]
            square.copy_(square.tril() + upper[start:end, start:end].triu(1))

    def pop_upper(self) -> Float[Tensor, "I I"] | None:
        """Return the stashed matrix in memory of its own, or None."""
        upper = self._remove_stashed() if self._stashed is None else self._stashed
        self._stashed = None
        return upper

    def _remove_stashed(self) -> Float[Tensor, "I I"] | None:
        if self._stashed_diagonal is None:
            return None
        upper = self.total.triu(1)
        upper.diagonal().copy_(self._stashed_diagonal)
        self._stashed_diagonal = None
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
    def finite(self) -> Bool[Tensor, ""]:
        # An input that is not finite makes its diagonal element not finite.
        return self.total.diagonal().isfinite().all()


def lower_panels(square: Float[Tensor, "I I"]) -> Iterator[Float[Tensor, "R C"]]:
    """Yield the lower triangle in panels of ``PANEL`` rows, as views."""
    for start in range(0, len(square), PANEL):
        yield square[start : start + PANEL, : start + PANEL]
