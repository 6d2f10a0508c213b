"""TODO-DOC kernels/prunekit_kernels/_source.py (out of kernels/prunekit_kernels/_choosing.py)."""

from typing import NamedTuple

from torch import Tensor

from prunekit_kernels._select_keys import DUAL, SCORE, WEIGHT


class Source(NamedTuple):
    """Where scores come from and what is written: all that the kernels are given.

    Attributes:
        kind: ``SCORE``: ``x``; nothing is written but bits. ``WEIGHT``: |x| · (row + column) ·
            scale; ``out`` is ``x``, zeroed in place. ``DUAL``: |T| with T = x + dual · factor[0];
            ``out`` gets T or 0, ``dual`` 0 or T · factor[1].
        x: The matrix.
        out: What is written.
        dual: Only of ``DUAL``.
        row: [O] float32, only of ``WEIGHT``, as ``column`` [I] and ``scale`` [I]; None for none.
        factor: Two numbers of ``DUAL``.
    """

    kind: int
    x: Tensor
    out: Tensor
    dual: Tensor
    row: Tensor | None = None
    column: Tensor | None = None
    scale: Tensor | None = None
    factor: tuple[float, float] = (0.0, 0.0)

    def arguments(self) -> tuple:
        """Return what every kernel begins with."""
        vectors = (self.x if part is None else part for part in (self.row, self.column, self.scale))
        return (
            self.x, self.out, self.dual, *vectors, *self.factor, *self.x.shape,
            *self.x.stride(), *self.out.stride(), *self.dual.stride(),
        )  # fmt: skip

    def options(self) -> dict:
        """Return the constants of every kernel."""
        return {
            "KIND": self.kind,
            "SHARES": self.row is not None,
            "SCALED": self.scale is not None,
            # A product and a sum are rounded one after the other, as PyTorch does.
            "enable_fp_fusion": False,
        }


def scores(score: Tensor) -> Source:
    """Return a source that only chooses."""
    return Source(SCORE, score, score, score)


def weights(
    weight: Tensor, scale: Tensor | None, row: Tensor | None, column: Tensor | None
) -> Source:
    """Return a source that zeroes a weight in place."""
    return Source(WEIGHT, weight, weight, weight, row, column, scale)


def iterate(x: Tensor, dual: Tensor, rho: float, out: Tensor) -> Source:
    """Return a source that projects an iterate and updates its dual."""
    return Source(DUAL, x, out, dual, factor=(1 / rho, rho))
