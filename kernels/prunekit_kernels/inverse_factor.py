"""Inverse factor: upper triangular U with UᵀU = (G + λI)⁻¹.

Row j of U says how the columns from j on compensate for pruning column j (optimal brain surgeon).
The published code takes Cholesky, inverse, Cholesky. With J, which reverses the order, one Cholesky
and one triangular inverse suffice, with half the operations and one point of failure:

    J (G + λI) J = L Lᵀ,  U = J L⁻¹ J

Source: Frantar & Alistarh, SparseGPT, §3.2, arXiv:2301.00774.
Shapes: I input features.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit_kernels._precision import full_precision
from prunekit_kernels.gram import mirror
from prunekit_kernels.pending import Pending, is_remote, to_host, value_of

LEAF = 128  # largest triangle that is inverted directly: fastest of 64..512 at I = 2048
PANEL = 256  # rows and columns moved at a time, so that working in place needs little memory


class Factor(NamedTuple):
    """Result of :func:`inverse_factor`.

    Attributes:
        upper: U, zero below its diagonal.
        damping: The fraction of the mean diagonal that was finally added.
        dead: Inputs that were always zero.
    """

    upper: Float[Tensor, "I I"]
    damping: float
    dead: Bool[Tensor, " I"]


def inverse_factor(gram: Float[Tensor, "I I"], damping: float) -> Factor:
    """Return the upper U with UᵀU = (G + λI)⁻¹.

    λ is ``damping`` times the mean diagonal. As in the published code, a dead input gets the
    diagonal 1 before the mean is taken. A matrix that is not positive definite is factored in
    float64, then with ten times the damping, and so on up to 1 (from 1e-6, if ``damping`` is 0).

    Args:
        gram: Float32; only its lower triangle is read, nothing is changed. Allocates one more
            matrix of its size and a few panels of ``PANEL`` columns; where float64 is needed, three
            matrices' worth.
        damping: Fraction of the mean diagonal, 0..1.

    Raises:
        ArithmeticError: No damping made the matrix positive definite.
    """
    dead = gram.diagonal() == 0
    ladder = tuple(dampings(damping))
    for attempt in ladder:
        for dtype in (torch.float32, torch.float64):
            upper = _factor(gram, dead, attempt, dtype)
            if upper is not None:
                return Factor(upper.float(), attempt, dead)
    raise ArithmeticError(
        f"The Gram matrix is not positive definite, even with a damping of"
        f" {ladder[-1]:g} times its mean diagonal."
    )


def inverse_factor_reference(gram: Float[Tensor, "I I"], damping: float) -> Float[Tensor, "I I"]:
    """Return U as the published code does: Cholesky, inverse, Cholesky.

    Both triangles of ``gram`` are read.
    """
    diagonal = gram.diagonal()
    diagonal = torch.where(diagonal == 0, 1, diagonal)
    damped = gram + torch.diag(diagonal + damping * diagonal.mean() - gram.diagonal())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def cholesky(matrix: Float[Tensor, "I I"]) -> bool | Pending:
    """Replace a matrix by its lower Cholesky factor; return whether it succeeded.

    The matrix must be column-major, which is the order in which LAPACK works in place; for a
    symmetric matrix in rows that is the transpose. Only the lower triangle is read.

    Returns:
        Whether the matrix is positive definite and its factor finite; of a GPU on its way, for
        :func:`prunekit_kernels.value_of`, so that work on the factor can be asked for meanwhile.
    """
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    return to_host((info == 0) & matrix.diagonal().isfinite().all())


def invert_factored(lower: Float[Tensor, "I I"]) -> None:
    """Replace L by (LLᵀ)⁻¹, both triangles.

    A GPU takes L⁻¹ and its product with its transpose, n³ / 3 each, mostly matrix products; the
    library solves for all columns of the identity, 2 n³. A CPU's library does what is done here.

    Args:
        lower: L, column-major, zero above its diagonal.
    """
    if not is_remote(lower.device):
        torch.cholesky_inverse(lower, out=lower)
        return
    with full_precision():
        _invert(lower)
        _square(lower)


def _square(lower: Tensor) -> None:
    """Replace a lower triangular L by LᵀL, both triangles.

    Rows of the result depend on rows of L from theirs on, so that they can take the place of L's.
    """
    for start in range(0, len(lower), PANEL):
        end = start + PANEL
        lower[start:end, :end] = lower[start:, start:end].T @ lower[start:, :end]
    mirror(lower)


def dampings(damping: float) -> Iterator[float]:
    """Yield a damping, then tenfold ones up to 1.

    They are tried until a matrix has a factor.
    """
    yield damping
    while damping < 1:
        damping = min(1.0, 10 * damping) if damping else 1e-6
        yield damping


def _factor(gram: Tensor, dead: Tensor, damping: float, dtype: torch.dtype) -> Tensor | None:
    # LAPACK is column-major: transposed, it overwrites the lower triangle in place.
    work = torch.empty_like(gram, dtype=dtype).copy_(gram)
    _reverse(work)
    work = work.T
    diagonal = work.diagonal()
    diagonal += dead.flip(0)
    diagonal += damping * diagonal.mean()
    succeeded = cholesky(work)
    if succeeded is False:
        return None
    with full_precision():
        _invert(work)
    _reverse(work)
    return work if value_of(succeeded) else None


def _reverse(square: Tensor) -> None:
    """Reverse the order of rows and columns in place, in panels."""
    size = len(square)
    for start in range(0, size // 2, PANEL):
        end = min(start + PANEL, size // 2)
        top, bottom = square[start:end], square[size - end : size - start]
        kept = top.flip((0, 1))
        top.copy_(bottom.flip((0, 1)))
        bottom.copy_(kept)
    if size % 2:
        middle = square[size // 2]
        middle.copy_(middle.flip(0))


def _invert(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place.

    [A 0; B C]⁻¹ = [A⁻¹ 0; −C⁻¹ B A⁻¹  C⁻¹]
    """
    size = len(lower)
    if size <= LEAF:
        unit = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, unit, upper=False))
        return
    half = size // 2
    first, below, last = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _solve_left(last, below.neg_())
    _solve_right(first, below)
    _invert(first)
    _invert(last)


def _solve_left(lower: Tensor, b: Tensor) -> None:
    """Replace ``b`` by L⁻¹ b, by halves: only leaves are copied."""
    size, half = len(lower), len(lower) // 2
    if size <= LEAF:
        b.copy_(torch.linalg.solve_triangular(lower, b, upper=False))
        return
    _solve_left(lower[:half, :half], b[:half])
    b[half:].addmm_(lower[half:, :half], b[:half], alpha=-1)
    _solve_left(lower[half:, half:], b[half:])


def _solve_right(lower: Tensor, b: Tensor) -> None:
    """Replace ``b`` by b L⁻¹, from the last columns to the first."""
    size, half = len(lower), len(lower) // 2
    if size <= LEAF:
        b.copy_(torch.linalg.solve_triangular(lower, b, upper=False, left=False))
        return
    _solve_right(lower[half:, half:], b[:, half:])
    b[:, :half].addmm_(b[:, half:], lower[half:, :half], alpha=-1)
    _solve_right(lower[:half, :half], b[:, :half])
