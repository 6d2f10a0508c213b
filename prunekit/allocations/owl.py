"""OWL: higher density for blocks with more outliers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from typing_extensions import override

from prunekit.allocations.base import Allocation, Survey
from prunekit.errors import NumericsError
from prunekit.methods.layer import Layer
from prunekit.methods.wanda import Wanda
from prunekit.statistics import ColumnEnergy, Statistic

if TYPE_CHECKING:
    from torch import Tensor


class Owl(Allocation):
    """Density of a block rises with its share of outlier scores.

    Yin et al., arXiv:2310.05175, eq. 2 and 3: with D the share of Wanda scores above ``outlier``
    times their mean in each block, scaled to ``[0, 2·spread]``, block density = D − mean(D) +
    (1 − sparsity). The mean is weighted by the sizes of the blocks, so that the budget is met
    exactly also when they differ.
    """

    name: ClassVar[str] = "owl"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({ColumnEnergy})

    outlier: float = Field(default=5.0, gt=1)
    """M: a score above M times the mean of its block is an outlier."""
    spread: float = Field(default=0.08, gt=0, lt=0.5)
    """λ: no block's sparsity leaves the target by more than twice this; published as lambda."""

    @override
    def allocate(
        self, sizes: Mapping[str, int], survey: Survey, sparsity: float
    ) -> dict[str, float]:
        import torch

        names, shares, counts = [], [], []
        for layers in survey():
            pruned = [layer for layer in layers if layer.name in sizes]
            if not pruned:
                continue
            names.append([layer.name for layer in pruned])
            shares.append(_outlier_share(pruned, self.outlier))
            counts.append(sum(sizes[layer.name] for layer in pruned))
        share = torch.tensor(shares, dtype=torch.float64)
        count = torch.tensor(counts, dtype=torch.float64)
        share -= share.min()
        if share.max() > 0:
            share *= 2 * self.spread / share.max()
        result = sparsity - (share - (share * count).sum() / count.sum())
        self._check(result, sparsity)
        return {
            name: value
            for block, value in zip(names, result.tolist(), strict=True)
            for name in block
        }

    def _check(self, result: Tensor, sparsity: float) -> None:
        if result.min() < 0 or result.max() > 1:
            raise NumericsError(
                f"allocation owl: with sparsity {sparsity} and spread {self.spread} blocks would "
                f"get {result.min():.3f} to {result.max():.3f}; lower the spread."
            )


def _outlier_share(layers: list[Layer], outlier: float) -> float:
    scores = [Wanda().score(layer) for layer in layers]
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.double().sum()) for score in scores) / count
    return sum(int((score > outlier * mean).sum()) for score in scores) / count
