"""SparseGPT: prune column by column and let the columns to come make up for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from pydantic import Field
from typing_extensions import override

from prunekit.errors import NumericsError
from prunekit.layer import Layer, Pruned
from prunekit.methods.base import Method
from prunekit.patterns import Scope
from prunekit.statistics import Gram, Statistic

if TYPE_CHECKING:
    from prunekit_kernels import Factor
    from torch import Tensor

STACKED = 4096
"""Rows up to which the layers of a stage are swept as one; wider ones are busy by themselves."""


class SparseGPT(Method):
    """Blocked optimal-brain-surgeon updates (Frantar & Alistarh, arXiv:2301.00774, Algorithm 1)."""

    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})
    scope: ClassVar[Scope] = "block"

    damping: float = Field(default=0.01, ge=0, le=1)
    """Added to the Gram matrix's diagonal, as a fraction of its mean; raised where it must be."""

    @override
    def prune(self, layer: Layer) -> Pruned:
        return self.prune_together([layer])[0]

    @override
    def prune_together(self, layers: Sequence[Layer]) -> list[Pruned]:
        """Sweep narrow layers stacked: they share the factor, and each column costs a call."""
        if sum(len(layer.weight) for layer in layers) > STACKED:
            return [self._sweep([layer])[0] for layer in layers]
        return self._sweep(layers) if layers else []

    def _sweep(self, layers: Sequence[Layer]) -> list[Pruned]:
        import torch

        factor = layers[0].stats.once(("factor", self.damping), lambda: self._factor(layers[0]))
        dense = torch.cat([layer.weight for layer in layers])
        # A dead input never spoke, so its weights go first, as in the published code; those that
        # may stay keep their value, so that the count of zeros is exact.
        weight = dense.masked_fill(factor.dead, 0)
        keep = _sweep(layers, weight, factor)
        weight = dense.where(keep & factor.dead, weight)
        rows = [len(layer.weight) for layer in layers]
        facts = {"damping": factor.damping}
        return [
            Pruned(weight, keep, facts)
            for weight, keep in zip(weight.split(rows), keep.split(rows), strict=True)
        ]

    def _factor(self, layer: Layer) -> Factor:
        from prunekit_kernels import inverse_factor

        try:
            return inverse_factor(layer.stats[Gram].total, self.damping)
        except ArithmeticError as error:
            raise NumericsError(f"{layer.name}: {error} Use more calibration tokens.") from error


def _sweep(layers: Sequence[Layer], weight: Float[Tensor, "O I"], factor: Factor) -> Tensor:
    """Sweep the stacked weights of layers; each layer chooses among its own rows."""
    import torch
    from prunekit_kernels import obs_sweep

    rows = [len(layer.weight) for layer in layers]
    pattern = layers[0].pattern
    if pattern.stride is None:
        scores = (weight / factor.upper.diagonal()).square().split(rows)
        parts = zip(layers, scores, strict=True)
        whole = torch.cat([pattern.keep(score, layer.sparsity) for layer, score in parts])

    def choose(score: Tensor, start: int) -> Tensor:
        if pattern.stride is None:
            return whole[:, start : start + score.shape[1]]
        if pattern.sparsity is not None:  # the same for all rows, each by itself
            return pattern.keep_columns(score, start, pattern.sparsity)
        parts = zip(layers, score.split(rows), strict=True)
        kept = [pattern.keep_columns(part, start, layer.sparsity) for layer, part in parts]
        return torch.cat(kept)

    return obs_sweep(weight, factor.upper, choose, pattern.stride)
