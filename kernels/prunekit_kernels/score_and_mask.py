"""Score and mask: score a weight, select, zero pruned entries.

    score = |W| · (row + column) · scale

Magnitude needs no factor, Wanda the input norms as ``scale``, RIA in addition the inverse sums of
the rows and columns of |W| as ``shares``. A kernel stores no score except the sums of tiles
(blocks, rows and columns): where a group fits one program, the weight is read, selected and written
in one pass. On the CPU the scores are a tensor, in PyTorch.

Source: Han et al., arXiv:1506.02626; Sun et al., arXiv:2306.11695, eq. 1; Zhang et al., Plug-and-
Play, ICLR 2024, eq. 4.
Shapes: O output features, I input features, B = ⌈I / 8⌉ bytes.
"""

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from prunekit_kernels import _select, _source
from prunekit_kernels._triton import runs_triton
from prunekit_kernels.groups import Groups
from prunekit_kernels.packed_mask import pack, zero
from prunekit_kernels.selection import choose_reference, plain, row_chunks

Shares = tuple[Float[Tensor, " O"], Float[Tensor, " I"]]


def score_and_mask(
    weight: Float[Tensor, "O I"],
    groups: Groups,
    scale: Float[Tensor, " I"] | None = None,
    shares: Shares | None = None,
) -> UInt8[Tensor, "O B"]:
    """Zero pruned entries in place and return the packed mask.

    Args:
        weight: float32, float16 or bfloat16, any strides; scored in float32. Float64 is scored in
            float64, in PyTorch on all devices.
        groups: The groups and their counts.
        scale: Factor per input.
        shares: Addend per row and addend per column; their sum is a factor.

    Raises:
        ValueError: Shapes, types, devices or the groups do not match.
    """
    if not weight.is_floating_point():
        raise ValueError(f"weight must be of a float type, got {weight.dtype}")
    row, column = shares or (None, None)
    outputs, inputs = weight.shape
    for name, size, factor in (("row", outputs, row), ("column", inputs, column),
                               ("scale", inputs, scale)):  # fmt: skip
        if factor is not None:
            _check(name, factor, weight, size)
    groups.check(outputs, inputs)
    return _score_and_mask(weight, groups.numbers(), scale, row, column)


def score(
    weight: Float[Tensor, "O I"],
    scale: Float[Tensor, " I"] | None = None,
    shares: Shares | None = None,
) -> Float[Tensor, "O I"]:
    """Return the scores, in the kernels' order of arithmetic, bit for bit.

    Args:
        weight: Any float type; scored in float32, float64 in float64.
        scale: Factor per input, or None.
        shares: Addends per row and per column, or None.
    """
    found = weight.abs().to(_precision(weight))
    if shares is not None:
        found = found.mul_(shares[0][:, None] + shares[1])
    return found if scale is None else found.mul_(scale)


def score_and_mask_reference(
    weight: Float[Tensor, "O I"],
    groups: Groups,
    scale: Float[Tensor, " I"] | None = None,
    shares: Shares | None = None,
) -> tuple[Float[Tensor, "O I"], Bool[Tensor, "O I"]]:
    """Return the pruned weight and the keep mask by sorting.

    The published tools sort as well.

    Args:
        weight: As in :func:`score_and_mask`; not changed.
        groups: The groups and their counts.
        scale: Factor per input.
        shares: Addends per row and per column.
    """
    keep = choose_reference(score(weight, scale, shares), groups)
    return weight.where(keep, 0), keep


def _precision(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _check(name: str, factor: Tensor, weight: Tensor, size: int) -> None:
    dtype = _precision(weight)
    if factor.dtype != dtype or factor.shape != (size,) or factor.device != weight.device:
        raise ValueError(
            f"{name} must be {dtype} of shape {(size,)} on {weight.device}, "
            f"got {factor.dtype} of shape {tuple(factor.shape)} on {factor.device}"
        )


@torch.library.custom_op("prunekit::score_and_mask", mutates_args=("weight",))
def _score_and_mask(
    weight: Tensor,
    groups: list[int],
    scale: Tensor | None,
    row: Tensor | None,
    column: Tensor | None,
) -> Tensor:
    chosen = Groups.of(groups)
    if runs_triton(weight) and weight.dtype != torch.float64:
        return _launch(weight, chosen, scale, row, column)
    outputs, inputs = weight.shape
    bits = torch.empty(outputs, -(-inputs // 8), dtype=torch.uint8, device=weight.device)
    for rows in row_chunks(chosen, outputs, inputs):
        shares = None if row is None or column is None else (row[rows], column)
        keep = plain(score(weight[rows], scale, shares), chosen)
        zero(keep, weight[rows])
        bits[rows] = pack(keep)
    return bits


@_score_and_mask.register_fake
def _(
    weight: Tensor,
    groups: list[int],  # noqa: ARG001
    scale: Tensor | None,  # noqa: ARG001
    row: Tensor | None,  # noqa: ARG001
    column: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return weight.new_empty((weight.shape[0], -(-weight.shape[1] // 8)), dtype=torch.uint8)


def _launch(
    weight: Tensor,
    groups: Groups,
    scale: Tensor | None,
    row: Tensor | None,
    column: Tensor | None,
) -> Tensor:
    vectors = (None if part is None else part.contiguous() for part in (scale, row, column))
    return _select.launch(_source.weights(weight, *vectors), groups)
