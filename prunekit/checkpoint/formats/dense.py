"""Dense format: zeros included, readable by every tool."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from prunekit.checkpoint.formats.base import Format, Parts, WeightLayout

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Dense(Format):
    """All values, zeros included; readable by every tool, but not smaller."""

    name: ClassVar[str] = "dense"
    parts: ClassVar[tuple[str, ...]] = ("weight",)

    @override
    def why_not_storable(self, weight: Tensor) -> None:
        return None

    @override
    def compress(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight}

    @override
    def expand(self, parts: Parts, inputs: int) -> Tensor:
        return parts["weight"]

    @override
    def find_contradiction(self, parts: Parts, layout: WeightLayout) -> None:
        return None

    @override
    def empty(self, layout: WeightLayout, dtype: torch.dtype) -> dict[str, Tensor]:
        import torch

        return {"weight": torch.empty(layout.outputs, layout.inputs, dtype=dtype)}

    @override
    def multiply(self, x: Tensor, parts: Parts, max_kernel_tokens: int | None = None) -> Tensor:
        return x @ parts["weight"].T
