"""2:4 format with values of eight bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from prunekit.checkpoint.formats.base import Format, Parts, WeightLayout
from prunekit.checkpoint.formats.two_four import TwoFour

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST_CODES = range(128, 63, -1)
"""Codes that the largest weight of a row may have: 127 or 128 where it was rounded to nearest, less
where it took up the errors of others; below 64 seven bits would do."""


class TwoFourInt8(Format):
    """Two of every four values in eight bits, with scales.

    A 16-bit weight takes 0.3125 of its dense size. It stores weights on such a grid, as prunekit
    quantize --scheme int8 leaves them, to the bit. Loads as sparse layers where prunekit is
    installed, which expand them for each product; without it transformers refuses the checkpoint.
    """

    name: ClassVar[str] = "2:4-int8"
    parts: ClassVar[tuple[str, ...]] = ("weight", "keep", "scale")
    patterns: ClassVar[tuple[str, ...] | None] = TwoFour.patterns
    typed_by: ClassVar[str] = "scale"

    @override
    def why_not_storable(self, weight: Tensor) -> str | None:
        if reason := TwoFour().why_not_storable(weight):
            return reason
        if (lost := int(_row_scales(weight).isnan().sum())) > 0:
            return (
                f"{lost} of {len(weight)} rows are no multiples of a scale by eight bits; round "
                "them first: prunekit quantize --scheme int8"
            )
        return None

    @override
    def compress(self, weight: Tensor) -> dict[str, Tensor]:
        from prunekit_kernels import codes, compress24

        scale = _row_scales(weight)
        if scale.isnan().any():
            raise ValueError("a row has weights that are no multiples of one scale")
        found = codes(weight.float(), scale.float()[:, None], "int8")
        values, keep = compress24(found)
        return {"weight": values, "keep": keep, "scale": scale}

    @override
    def expand(self, parts: Parts, inputs: int) -> Tensor:
        from prunekit_kernels import expand24

        scale = parts["scale"]
        dense = expand24(parts["weight"], parts["keep"]).float()
        return dense.mul_(scale.float()[:, None]).to(scale.dtype)

    @override
    def find_contradiction(self, parts: Parts, layout: WeightLayout) -> str | None:
        scale = parts["scale"]
        if not (scale.isfinite() & (scale > 0)).all():
            return "a scale is not a positive number"
        return TwoFour().find_contradiction(parts, layout)

    @override
    def empty(self, layout: WeightLayout, dtype: torch.dtype) -> dict[str, Tensor]:
        import torch

        values = TwoFour().empty(layout, torch.int8)
        return {**values, "scale": torch.empty(layout.outputs, dtype=dtype)}

    @override
    def multiply(self, x: Tensor, parts: Parts, max_kernel_tokens: int | None = None) -> Tensor:
        return x @ self.expand(parts, x.shape[1]).T


def _row_scales(weight: Tensor) -> Tensor:
    """Return the scale of which each row has exact multiples, or NaN.

    Where a weight is a code times a scale, rounded, the largest is off by half a unit in the last
    place; so is the quotient, and the scale is a neighbour of it.
    """
    import torch
    from prunekit_kernels.packed_mask import INTEGERS

    largest = weight.float().abs().amax(1)
    scale = torch.full_like(largest, torch.nan).masked_fill_(largest == 0, 1).to(weight.dtype)
    integers = INTEGERS[weight.itemsize]
    for code in LARGEST_CODES:
        for step in (0, -1, 1):
            left = scale.isnan().nonzero().flatten()
            if not len(left):
                return scale
            quotient = (largest[left] / code).to(weight.dtype)
            tried = quotient.view(integers).add(step).view(weight.dtype)
            scale[left] = torch.where(_holds(weight[left], tried), tried, torch.nan)
    return scale


def _holds(rows: Tensor, scale: Tensor) -> Tensor:
    """Return which rows are multiples of their scales, rounded to their type."""
    from prunekit_kernels import nearest

    wide = scale.float()[:, None]
    same = nearest(rows.float(), wide, "int8").to(rows.dtype) == rows
    return same.all(1) & (wide > 0).flatten()
