"""2:4 format, for sparse tensor cores."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from prunekit.checkpoint.formats.base import Format, Parts, WeightLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class TwoFour(Format):
    """Two of every four values and one bit per weight.

    A 16-bit weight takes 0.5625 of its dense size. Loads as sparse layers where prunekit is
    installed; without it transformers refuses the checkpoint.
    """

    name: ClassVar[str] = "2:4"
    parts: ClassVar[tuple[str, ...]] = ("weight", "keep")
    patterns: ClassVar[tuple[str, ...] | None] = ("2:4", "1:4")

    @override
    def why_not_storable(self, weight: Tensor) -> str | None:
        if weight.ndim != 2 or weight.shape[1] % 4:
            return f"shape {list(weight.shape)} has no groups of four inputs"
        if broken := int(((weight != 0).unflatten(1, (-1, 4)).sum(2) > 2).sum()):
            return f"{broken} groups of four have more than two non-zeros"
        return None

    @override
    def compress(self, weight: Tensor) -> dict[str, Tensor]:
        from prunekit_kernels import compress24

        values, keep = compress24(weight)
        return {"weight": values, "keep": keep}

    @override
    def expand(self, parts: Parts, inputs: int) -> Tensor:
        from prunekit_kernels import expand24

        return expand24(parts["weight"], parts["keep"])

    @override
    def find_contradiction(self, parts: Parts, layout: WeightLayout) -> str | None:
        from prunekit_kernels import count_broken24

        if layout.inputs % 4:
            return f"{layout.inputs} columns are no groups of four"
        keep = parts["keep"]
        if layout.inputs % 8 and (keep[:, -1] >> 4).any():
            return f"bits are set beyond its {layout.inputs} columns"
        if broken := count_broken24(keep, layout.inputs):
            return f"{broken} groups of four do not have two keep bits"
        return None

    @override
    def empty(self, layout: WeightLayout, dtype: torch.dtype) -> dict[str, Tensor]:
        import torch

        return {
            "weight": torch.empty(layout.outputs, layout.inputs // 2, dtype=dtype),
            "keep": torch.empty(layout.outputs, -(-layout.inputs // 8), dtype=torch.uint8),
        }

    @override
    def multiply(self, x: Tensor, parts: Parts, max_kernel_tokens: int | None = None) -> Tensor:
        from prunekit_kernels import sparse24_matmul

        return sparse24_matmul(x, parts["weight"], parts["keep"], max_kernel_tokens)
