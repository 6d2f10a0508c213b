"""Which rows of a matrix count: all, those of a mask (padding), or of a list (one expert's)."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Rows = Bool[Tensor, " T"] | Int[Tensor, " R"]

ALL, LISTED, MASKED = 0, 1, 2
"""The constant a kernel is given."""


def check_rows(rows: Tensor | None, x: Tensor) -> None:
    """Check that rows can be taken of ``x``; an op looks whether they are in range.

    Raises:
        ValueError: They are no mask of its length and no list of integers, or elsewhere.
    """
    if rows is None:
        return
    mask = rows.dtype == torch.bool and rows.shape == x.shape[:1]
    listed = rows.dtype in (torch.int32, torch.int64) and rows.ndim == 1
    if not (mask or listed) or rows.device != x.device:
        raise ValueError(
            f"rows must be bool of shape {tuple(x.shape[:1])}, or a list of integers, on"
            f" {x.device}, got {rows.dtype} of shape {tuple(rows.shape)} on {rows.device}"
        )


def taken(x: Tensor, rows: Tensor | None) -> Tensor:
    """Return the rows that count.

    Raises:
        RuntimeError: A listed row is not one of x.
    """
    _check_range(x, rows)
    return x if rows is None else x[rows]


def arguments(x: Tensor, rows: Tensor | None) -> tuple[Tensor, int, int, int]:
    """Return what a kernel is given: the rows, their stride, how many to look at, and the kind.

    Raises:
        RuntimeError: A listed row is not one of x; on CUDA when the device gets there, as PyTorch
            does when it indexes.
    """
    _check_range(x, rows)
    if rows is None:
        return x, 0, len(x), ALL
    return rows, rows.stride(0), len(rows), MASKED if rows.dtype == torch.bool else LISTED


def _check_range(x: Tensor, rows: Tensor | None) -> None:
    if rows is not None and rows.dtype != torch.bool:
        inside = ((rows >= 0) & (rows < len(x))).all()
        message = f"rows must be from 0 to {len(x) - 1}"
        torch._assert_async(inside, message)  # pyright: ignore[reportPrivateImportUsage]
