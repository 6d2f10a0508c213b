"""LLM-Pruner: units whose weights, set to zero, would change the loss least go first."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker
from prunekit.structured.rankers.parameter_gradient import by_matrix


class LLMPruner(Ranker):
    """``Σ |W · ∂L/∂W|`` over all weights of a unit (Ma et al. 2023, element-wise, first order).

    Source: arXiv:2305.11627, eq. 3 without its second term, importance of a group as a sum.
    """

    name: ClassVar[str] = "llm-pruner"
    needs_loss: ClassVar[bool] = True

    @override
    def score(self, subject: GatedModel) -> Scores:
        return by_matrix(subject, lambda weight, gradient: (weight * gradient).abs(), root=False)
