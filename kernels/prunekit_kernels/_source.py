"""Sources of scores: the arguments that every selection kernel takes.

Shapes: O output features, I input features.
"""

from typing import NamedTuple

from torch import Tensor

from prunekit_kernels._select_keys import DUAL, SCORE, WEIGHT


class Source(NamedTuple):
    """A source of scores and the tensors that selection writes.

    Attributes:
        kind: ``SCORE``: the score is ``x``, and only bits are written. ``WEIGHT``: the score is
            |x| · (row + column) · scale, and ``out`` is ``x``, zeroed in place. ``DUAL``: the score
            is |T| with T = x + dual · factor[0]; ``out`` becomes T or 0, ``dual`` 0 or T ·
            factor[1].
        x: The matrix [O, I].
        out: The matrix that is written [O, I].
        dual: Only for ``DUAL`` [O, I].
        row: [O] float32, only for ``WEIGHT``, as ``column`` [I] and ``scale`` [I]; None: not a
            factor.
        factor: The two numbers of ``DUAL``.
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
        """Return the positional arguments that every kernel begins with."""
        vectors = (self.x if part is None else part for part in (self.row, self.column, self.scale))
        return (
            self.x, self.out, self.dual, *vectors, *self.factor, *self.x.shape,
            *self.x.stride(), *self.out.stride(), *self.dual.stride(),
        )  # fmt: skip

    def options(self) -> dict:
        """Return the compile-time constants and launch options of every kernel."""
        return {
            "KIND": self.kind,
            "SHARES": self.row is not None,
            "SCALED": self.scale is not None,
            # Products and sums are rounded separately, as in PyTorch.
            "enable_fp_fusion": False,
        }


def scores(score: Tensor) -> Source:
    """Return a source for selection alone."""
    return Source(SCORE, score, score, score)


def weights(
    weight: Tensor, scale: Tensor | None, row: Tensor | None, column: Tensor | None
) -> Source:
    """Return a source that zeroes a weight in place.

    Args:
        weight: float32, float16 or bfloat16 [O, I].
        scale: Factor per input [I], or None.
        row: Addend per row [O], or None together with ``column``.
        column: Addend per column [I].
    """
    return Source(WEIGHT, weight, weight, weight, row, column, scale)


def iterate(x: Tensor, dual: Tensor, rho: float, out: Tensor) -> Source:
    """Return a source that projects an ADMM iterate and updates its dual.

    Args:
        x: Iterate [O, I], float32.
        dual: Unscaled dual [O, I], changed in place.
        rho: Penalty ρ.
        out: Receives the projection [O, I].
    """
    return Source(DUAL, x, out, dual, factor=(1 / rho, rho))
