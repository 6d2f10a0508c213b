"""SparseGPT: prune column by column and let the columns to come make up for it."""

from __future__ import annotations

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


class SparseGPT(Method):
    """Blocked optimal-brain-surgeon updates (Frantar & Alistarh, arXiv:2301.00774, Algorithm 1)."""

    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})
    scope: ClassVar[Scope] = "block"

    damping: float = Field(default=0.01, ge=0, le=1)
    """Added to the Gram matrix's diagonal, as a fraction of its mean; raised where it must be."""

    @override
    def prune(self, layer: Layer) -> Pruned:
        factor = layer.stats.once(("factor", self.damping), lambda: self._factor(layer))
        # A dead input never spoke, so its weights go first, as in the published code; those that
        # may stay keep their value, so that the count of zeros is exact.
        weight = layer.weight.masked_fill(factor.dead, 0)
        keep = _sweep(layer, weight, factor)
        weight = layer.weight.where(keep & factor.dead, weight)
        return Pruned(weight, keep, {"damping": factor.damping})

    def _factor(self, layer: Layer) -> Factor:
        from prunekit_kernels import inverse_factor

        try:
            return inverse_factor(layer.stats[Gram].total, self.damping)
        except ArithmeticError as error:
            raise NumericsError(f"{layer.name}: {error} Use more calibration tokens.") from error


def _sweep(layer: Layer, weight: Float[Tensor, "O I"], factor: Factor) -> Tensor:
    from prunekit_kernels import obs_sweep

    pattern, sparsity = layer.pattern, layer.sparsity
    if pattern.stride is not None:

        def choose(score: Tensor, start: int) -> Tensor:
            return pattern.keep_columns(score, start, sparsity)
    else:
        whole = pattern.keep((weight / factor.upper.diagonal()).square(), sparsity)

        def choose(score: Tensor, start: int) -> Tensor:
            return whole[:, start : start + score.shape[1]]

    return obs_sweep(weight, factor.upper, choose, pattern.stride)
