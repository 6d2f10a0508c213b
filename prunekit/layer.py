"""One linear layer as the methods see it, and what they give back.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float

from prunekit.patterns import Pattern
from prunekit.statistics import Gathered

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """A linear layer to prune.

    Attributes:
        name: Full name in the model, which also seeds what is random.
        weight: [O, I] float32, whatever the stored type or layout (Conv1D is transposed before).
        stats: What its method declared in ``needs``; shared by the linears of its stage.
        pattern: Which zeros are allowed.
        sparsity: Fraction of zeros, 0..1.
    """

    name: str
    weight: Float[Tensor, "O I"]
    stats: Gathered
    pattern: Pattern
    sparsity: float


@dataclass(frozen=True)
class Pruned:
    """A pruned layer: ``weight`` is zero wherever ``keep`` is False; ``facts`` go to the record."""

    weight: Float[Tensor, "O I"]
    keep: Bool[Tensor, "O I"]
    facts: dict[str, float] = field(default_factory=dict)
