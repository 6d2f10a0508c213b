"""Selection of rows: all, those of a mask, or a list.

A list holds, for example, the tokens routed to one expert.
Shapes: T tokens, R listed rows.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Rows = Bool[Tensor, " T"] | Int[Tensor, " R"]

ALL, LISTED, MASKED = 0, 1, 2
"""Values of a kernel's constant ``ROWS``."""


def check_rows(rows: Tensor | None, x: Tensor) -> None:
    """Check that ``rows`` can select rows of ``x``.

    The range of listed rows is checked by :func:`taken` and :func:`arguments`.

    Raises:
        ValueError: ``rows`` is neither a mask of the same length nor a list of integers, or is on
            another device.
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
    """Return the selected rows.

    Raises:
        RuntimeError: A listed row is out of range.
    """
    _check_range(x, rows)
    return x if rows is None else x[rows]


def arguments(x: Tensor, rows: Tensor | None) -> tuple[Tensor, int, int, int]:
    """Return a kernel's row arguments: rows, stride, number and kind.

    Raises:
        RuntimeError: A listed row is out of range; on CUDA asynchronously, as when PyTorch indexes.
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
