"""LLM-Pruner: prune units first whose weights at zero change the loss least."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker
from prunekit.structured.rankers.parameter_gradient import by_matrix


class LLMPruner(Ranker):
    """``Σ |W · ∂L/∂W|`` over all weights of a unit.

    Element-wise and of first order. Source: Ma et al. 2023, arXiv:2305.11627, eq. 3 without its
    second term, importance of a group as a sum.
    """

    name: ClassVar[str] = "llm-pruner"
    needs_loss: ClassVar[bool] = True
    by_weights: ClassVar[bool] = True

    @override
    def score(self, gated: GatedModel) -> Scores:
        return by_matrix(gated, lambda weight, gradient: (weight * gradient).abs(), root=False)
