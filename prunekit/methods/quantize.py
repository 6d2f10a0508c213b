"""Quantize a pruned layer: round kept weights, leave every zero.

On a Gram matrix it is the joint step of SparseGPT (Frantar & Alistarh, arXiv:2301.00774, §3.5): the
sweep that rounds a column passes its error on to later columns, and what is passed on to a pruned
weight is passed on again when its column is reached. Starting it at the pruned weight gives what
one sweep of the dense weight with this mask and grid would give, since the sweep is linear in what
it passes on; but the scales are then those of the weights that compensate. Then each column moves
to the grid values that err least from the outputs before pruning
(:mod:`prunekit_kernels.grid_descent`).

Shapes: O output features, I input features, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jaxtyping import Float

from prunekit.errors import NumericsError
from prunekit.methods.layer import Layer
from prunekit.statistics import Gram

if TYPE_CHECKING:
    import torch
    from prunekit_kernels import Grid
    from torch import Tensor

Scheme = Literal["int8", "fp8", "int4"]
DAMPING = 0.01
"""As published for GPTQ."""
PASSES = 2
"""Visits of each column after the sweep: the first takes most of what there is to gain."""


@dataclass(frozen=True)
class Quantization:
    """How kept weights are rounded.

    Attributes:
        scheme: The grid.
        group: Neighbours in a row that share a scale; None for the whole row.
        compensates: On a Gram matrix; else each weight is rounded to the nearest value.
    """

    scheme: Scheme
    group: int | None
    compensates: bool


@dataclass(frozen=True)
class Quantized:
    """A quantized layer.

    Attributes:
        weight: [O, I], multiples of the scales; zero wherever the pruned weight is.
        scale: [O, G], exact in the type in which it is stored.
    """

    weight: Float[Tensor, "O I"]
    scale: Float[Tensor, "O G"]


def quantize(
    layer: Layer,
    pruned: Float[Tensor, "O I"],
    quantization: Quantization,
    dtype: torch.dtype,
    *,
    compensate: bool = True,
) -> Quantized:
    """Round the weights that are not zero.

    Args:
        layer: The weight whose outputs are to be kept, and its statistics.
        pruned: The weight after pruning; it is not changed.
        quantization: How.
        dtype: Type in which scales are stored.
        compensate: False where the statistics are not of this layer, such as those of an expert
            without tokens.

    Raises:
        NumericsError: The Gram matrix has no factor.
    """
    from prunekit_kernels import Grid, grid_scales, nearest, spread

    kind, inputs = quantization.scheme, pruned.shape[1]
    compensates = quantization.compensates and compensate
    energy = layer.stats[Gram].total.diagonal() if compensates else None
    scale = grid_scales(pruned, kind, quantization.group or inputs, dtype, energy)
    grid = Grid(spread(scale, inputs), kind)
    if not compensates:
        return Quantized(nearest(pruned, grid.scale, kind), scale)
    return Quantized(_compensated(layer, pruned, grid), scale)


def _compensated(layer: Layer, pruned: Tensor, grid: Grid) -> Tensor:
    """Return the rounded weight that errs least on the layer's inputs."""
    from prunekit_kernels import grid_descent, inverse_factor, mean_diagonal, obs_sweep

    gram, weight, keep = layer.stats[Gram].full, pruned.clone(), pruned != 0
    try:
        factor = layer.stats.once(("factor", "grid"), lambda: inverse_factor(gram, DAMPING))
    except ArithmeticError as error:
        raise NumericsError(f"{layer.name}: {error} Use more calibration tokens.") from error
    obs_sweep(weight, factor.upper, keep, grid=grid)
    ridge = factor.damping * float(mean_diagonal(gram))
    grid_descent(weight, layer.weight, gram, keep, grid, ridge, PASSES)
    return weight
