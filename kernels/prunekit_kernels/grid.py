"""The values of a weight of few bits, symmetric about 0.

    int4: s · {−8 … 7},  int8: s · {−128 … 127},  fp8: s · e4m3 numbers up to ±448

with a scale s for each row, or for each group of neighbours in a row. A weight of 0 stays 0.

The scales of int4 are those, of ``SHRINKS`` of the one that reaches the largest weight, whose
rounding errs least: Σ h (w − q)², where h is the energy of the input. Frantar et al. search so too
(GPTQ, arXiv:2210.17323, published code), without h.
Shapes: O output features, I input features, G groups of a row.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

Kind = Literal["int4", "int8", "fp8"]
LARGEST: dict[str, float] = {"int4": 7, "int8": 127, "fp8": 448}
"""Code of the largest weight of a group."""
LOWEST: dict[str, float] = {"int4": -8, "int8": -128, "fp8": -448}
SHRINKS = 20
"""Scales that are tried for int4: 1, 0.975, … of the largest."""
STEP = 0.025
FLOAT8 = torch.float8_e4m3fn


class Grid(NamedTuple):
    """Scales of a weight, and which multiples of them it can have.

    Attributes:
        scale: The scale of each weight; expanded, so that columns can be put in another order.
        kind: Which multiples.
    """

    scale: Float[Tensor, "O I"]
    kind: Kind


def nearest(
    weight: Float[Tensor, "..."], scale: Float[Tensor, "..."], kind: str
) -> Float[Tensor, "..."]:
    """Return the nearest values on the grid, halves to even codes.

    Args:
        weight: Float32 or float64.
        scale: Of the same dtype, of a shape that broadcasts.
        kind: "int4", "int8" or "fp8".
    """
    return codes(weight, scale, kind).to(weight.dtype).mul_(scale)


def codes(
    weight: Float[Tensor, "..."], scale: Float[Tensor, "..."], kind: str
) -> Shaped[Tensor, "..."]:
    """Return the nearest multiples: int8 for int4 and int8, e4m3 for fp8.

    Arguments as in :func:`nearest`. NaN is no integer, so the caller looks for it before.
    """
    multiple = (weight / scale).clamp_(LOWEST[kind], LARGEST[kind])
    return multiple.to(FLOAT8) if kind == "fp8" else multiple.round_().to(torch.int8)


def grid_scales(
    weight: Float[Tensor, "O I"],
    kind: str,
    group: int,
    dtype: torch.dtype,
    energy: Float[Tensor, " I"] | None = None,
) -> Float[Tensor, "O G"]:
    """Return a scale for each group of a row.

    Args:
        weight: Float32 or float64.
        kind: "int4", "int8" or "fp8".
        group: Neighbours that share a scale; divides I.
        dtype: Type in which scales are stored; they are rounded to it.
        energy: Squared norm of each input, h; None for 1.

    Raises:
        ValueError: ``group`` does not divide the inputs.
    """
    outputs, inputs = weight.shape
    if group < 1 or inputs % group:
        raise ValueError(f"{inputs} inputs are not groups of {group}")
    groups = weight.view(outputs, -1, group)
    largest = groups.abs().amax(2) / LARGEST[kind]
    if kind != "int4":
        return _stored(largest, dtype)
    h = 1 if energy is None else energy.to(weight.dtype).view(-1, group)
    best, least = _stored(largest, dtype), torch.full_like(largest, torch.inf)
    for step in range(SHRINKS):
        scale = _stored(largest * (1 - STEP * step), dtype)
        lost = nearest(groups, scale[..., None], kind).sub_(groups).square_().mul_(h).sum(2)
        better = lost < least
        best, least = torch.where(better, scale, best), torch.where(better, lost, least)
    return best


def spread(scale: Float[Tensor, "O G"], inputs: int) -> Float[Tensor, "O I"]:
    """Return the scale of each weight."""
    return scale.repeat_interleave(inputs // scale.shape[1], 1)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales rounded to a dtype, positive; 1 for a group of zeros."""
    rounded = scale.to(dtype).clamp_(min=torch.finfo(dtype).tiny).to(scale.dtype)
    return rounded.masked_fill_(scale == 0, 1)
