"""Hybrid: weighted sum or product of the normalised scores of several rankers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from typing_extensions import override

from prunekit.models.units.kinds import KINDS, Compensation, Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker

if TYPE_CHECKING:
    from torch import Tensor


class Hybrid(Ranker):
    """``Σ weight · rank`` (or z-score, or product) of other rankers with their default settings."""

    name: ClassVar[str] = "hybrid"
    kinds: ClassVar[frozenset[Kind]] = frozenset(KINDS)
    compensate: ClassVar[Compensation] = "refit"

    of: Mapping[str, float] = Field(default={"surgeon": 1.0, "gradient": 1.0}, min_length=1)
    """The rankers and their weights."""

    by: Literal["z-score", "rank", "product"] = "rank"
    """Normalisation: ranks from 0 to 1 (ties share one), or z-scores over all units; product:
    ``Π scoreʷ``, w the weight, of scores shifted so that none is below 0."""

    @field_validator("of")
    @classmethod
    def _of_known(cls, of: Mapping[str, float]) -> Mapping[str, float]:
        for name in of:
            if name not in _known():
                raise ValueError(f"{name!r} is no ranker. Choose: {', '.join(_known())}.")
        return of

    @field_validator("by")
    @classmethod
    def _of_powers(cls, by: str, info: ValidationInfo) -> str:
        if by == "product" and min(info.data.get("of", {"": 1.0}).values()) <= 0:
            raise ValueError("product takes weights above 0 only: some scores are 0.")
        return by

    @property
    @override
    def components(self) -> list[Ranker]:
        return [_known()[name]() for name in self.of]

    @override
    def score(self, gated: GatedModel) -> Scores:
        return self.combine([part.score(gated) for part in self.components])

    @override
    def combine(self, measured: Sequence[Scores]) -> Scores:
        import torch

        from prunekit.structured.agreement import normalized_ranks

        terms, names = [], [*measured[0]]
        for scores, weight in zip(measured, self.of.values(), strict=True):
            flat = torch.cat([scores[name] for name in names])
            if self.by == "product":
                terms.append((flat - flat.min().clamp_max(0)) ** weight)
            else:
                terms.append(
                    weight * (_z_scores(flat) if self.by == "z-score" else normalized_ranks(flat))
                )
        stacked = torch.stack(terms)
        total = stacked.prod(0) if self.by == "product" else stacked.sum(0)
        parts = total.split([len(measured[0][name]) for name in names])
        return dict(zip(names, parts, strict=True))


def _known() -> dict[str, type[Ranker]]:
    from prunekit.structured.rankers import rankers

    return {name: kind for name, kind in rankers().items() if kind is not Hybrid}


def _z_scores(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / scores.std(correction=0).clamp_min(1e-300)
