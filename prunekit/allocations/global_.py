"""Global: one magnitude threshold for the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from prunekit.allocations.base import Allocation, Survey
from prunekit.patterns import pruned_count

if TYPE_CHECKING:
    from torch import Tensor

HALF = 1 << 16
"""Values of 16 bits."""


class Global(Allocation):
    """One threshold: exactly the k smallest magnitudes of the model are pruned.

    The threshold is found without holding the weights: float32 magnitudes have the order of their
    bit patterns, so one pass over the model counts the upper 16 bits, and a second one the lower 16
    bits of the values with the threshold's upper half. Of equal magnitudes those of earlier layers
    are kept.
    """

    name: ClassVar[str] = "global"
    methods: ClassVar[frozenset[str] | None] = frozenset({"magnitude"})

    @override
    def allocate(
        self, sizes: Mapping[str, int], survey: Survey, sparsity: float
    ) -> dict[str, float]:
        upper = _histograms(survey, sizes, lambda bits: bits >> 16)
        total = pruned_count(sparsity, sum(sizes.values()))
        cut, below = _cut(upper, total)
        lower = _histograms(survey, sizes, lambda bits: bits[bits >> 16 == cut] & (HALF - 1))
        last, inside = _cut(lower, total - sum(below.values()))
        left = total - sum(below.values()) - sum(inside.values())
        result = {}
        for name in reversed([*sizes]):
            tied = min(left, int(lower[name][last]))
            left -= tied
            result[name] = (below[name] + inside[name] + tied) / sizes[name]
        return result


def _histograms(survey: Survey, sizes: Mapping[str, int], bins) -> dict[str, Tensor]:  # noqa: ANN001
    import torch

    return {
        layer.name: torch.bincount(
            bins(layer.weight.abs().contiguous().view(torch.int32).flatten()), minlength=HALF
        ).cpu()
        for layers in survey()
        for layer in layers
        if layer.name in sizes
    }


def _cut(histograms: dict[str, Tensor], count: int) -> tuple[int, dict[str, int]]:
    """Return the bin of the ``count``-th value, and counts below it."""
    import torch

    running = sum(histograms.values(), torch.zeros(HALF, dtype=torch.int64)).cumsum(0)
    cut = min(int(torch.searchsorted(running, max(count, 1))), HALF - 1)
    return cut, {name: int(histogram[:cut].sum()) for name, histogram in histograms.items()}
