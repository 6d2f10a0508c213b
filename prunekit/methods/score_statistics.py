"""Lowest, highest, mean and standard deviation of the scores of a layer.

Rows are summed up on the device where the scores are; one transfer then brings the figures to the
host. Since rows are reduced one by one, it does not matter which rank has them.

Shapes: O output features of this rank, N of all ranks, I input features, U units of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float

if TYPE_CHECKING:
    from prunekit_kernels import Pending
    from torch import Tensor

KEY = "score_statistics"
"""Key of a record and of a report's layer."""
DIGITS = 7
"""Significant digits of the figures, those of float32."""


def row_statistics(score: Float[Tensor, "O I"]) -> Float[Tensor, "O 4"]:
    """Return lowest, highest, sum and norm of each row, as float64.

    A row is summed in the type of the scores: in float64 that would take twenty times as long.
    """
    import torch

    lowest, highest = torch.aminmax(score, dim=1)
    parts = lowest, highest, score.sum(1), torch.linalg.vector_norm(score, dim=1)
    return torch.stack(parts, 1).double()


def summarized(rows: Float[Tensor, "N 4"], size: int) -> dict[str, float] | Pending:
    """Return the statistics of all scores; of a GPU on their way.

    Args:
        rows: Those of each row, see :func:`row_statistics`.
        size: Number of scores.
    """
    import torch
    from prunekit_kernels import to_host

    lowest, highest, total, norm = rows.unbind(1)
    mean = total.sum() / size
    variance = (norm.square().sum() / size - mean.square()).clamp_min(0)
    found = torch.stack([lowest.min(), highest.max(), mean, variance.sqrt()])
    return to_host(found, lambda values: _named(values.tolist()))


def _named(values: Sequence[float]) -> dict[str, float]:
    names = ("min", "max", "mean", "std")
    return {name: float(f"{value:.{DIGITS}g}") for name, value in zip(names, values, strict=True)}


def with_scores(
    facts: Mapping[str, Any], gather: Callable[[Tensor], Tensor], size: int
) -> dict[str, Any]:
    """Return the facts of a layer with statistics of its scores.

    Args:
        facts: Facts of a method, which may have scores or not.
        gather: Returns the rows of all ranks, given this rank's.
        size: Number of weights of the layer.
    """
    if KEY not in facts:
        return dict(facts)
    return {**facts, KEY: summarized(gather(facts[KEY]), size)}


def unit_statistics(scores: Float[Tensor, " U"]) -> dict[str, float]:
    """Return the statistics of the scores of a group of units."""
    from prunekit_kernels import value_of

    return value_of(summarized(row_statistics(scores[None].double()), len(scores)))
