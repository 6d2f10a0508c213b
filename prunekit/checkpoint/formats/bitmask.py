"""Bitmask format: non-zero values and one bit per weight, any mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from prunekit.checkpoint.formats.base import Format, Parts, WeightLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class BitmaskFormat(Format):
    """Non-zero values and one bit per weight.

    At 50 % zeros a 16-bit weight takes 0.5625 of its dense size. Loads as sparse layers where
    prunekit is installed; without it transformers refuses the checkpoint.
    """

    name: ClassVar[str] = "bitmask"
    parts: ClassVar[tuple[str, ...]] = ("weight", "keep", "row_offsets")

    @override
    def why_not_storable(self, weight: Tensor) -> str | None:
        if weight.ndim != 2 or not weight.numel():
            return f"shape {list(weight.shape)} is not a matrix"
        kept, bits = int(weight.count_nonzero()), 8 * weight.element_size()
        if kept * bits + weight.numel() + 64 * len(weight) >= weight.numel() * bits:
            return f"only {weight.numel() - kept} of {weight.numel()} weights are zero"
        return None

    @override
    def compress(self, weight: Tensor) -> dict[str, Tensor]:
        from prunekit_kernels import compress_bitmask

        return dict(zip(self.parts, compress_bitmask(weight), strict=True))

    @override
    def expand(self, parts: Parts, inputs: int) -> Tensor:
        from prunekit_kernels import Bitmask, expand_bitmask

        return expand_bitmask(Bitmask(*(parts[part] for part in self.parts)), inputs)

    @override
    def find_contradiction(self, parts: Parts, layout: WeightLayout) -> str | None:
        from prunekit_kernels import popcount

        _, keep, offsets = (parts[part] for part in self.parts)
        if (pad := layout.inputs % 8) and (keep[:, -1] >> pad).any():
            return f"bits are set beyond its {layout.inputs} columns"
        counts = popcount(keep)
        ends = counts.cumsum(0)
        if not offsets.equal(ends - counts):
            return "the row offsets do not match its keep bits"
        if (kept := int(ends[-1]) if len(ends) else 0) != layout.value_count:
            return f"there are {layout.value_count} values for {kept} keep bits"
        return None

    @override
    def empty(self, layout: WeightLayout, dtype: torch.dtype) -> dict[str, Tensor]:
        import torch

        return {
            "weight": torch.empty(layout.value_count, dtype=dtype),
            "keep": torch.empty(layout.outputs, -(-layout.inputs // 8), dtype=torch.uint8),
            "row_offsets": torch.empty(layout.outputs, dtype=torch.int64),
        }

    @override
    def multiply(self, x: Tensor, parts: Parts, max_kernel_tokens: int | None = None) -> Tensor:
        from prunekit_kernels import Bitmask, bitmask_matvec

        bitmask = Bitmask(*(parts[part] for part in self.parts))
        return bitmask_matvec(x, bitmask, max_kernel_tokens)
