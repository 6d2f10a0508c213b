"""Hybrids: several rankers, made comparable and added up."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from prunekit.errors import ConfigError
from prunekit.rankers.agreement import places
from prunekit.rankers.base import Ranker, Scores, Subject


class Hybrid(Ranker):
    """``Σ weight · z-score`` (or rank) of other rankers with their default settings."""

    name: ClassVar[str] = "hybrid"

    of: Mapping[str, float] = Field(default={"output-norm": 1.0, "gradient": 1.0}, min_length=1)
    """The rankers and their weights."""

    by: Literal["z-score", "rank"] = "z-score"
    """Deviations from the mean over all units, or places from 0 to 1 (equal scores share one)."""

    @override
    def score(self, subject: Subject) -> Scores:
        from prunekit.rankers import rankers

        known = {name: kind for name, kind in rankers().items() if kind is not Hybrid}
        total = torch.zeros(sum(site.units for site in subject.sites), dtype=torch.float64)
        for name, weight in self.of.items():
            if name not in known:
                raise ConfigError(f"hybrid: {name!r} is no ranker. Choose: {', '.join(known)}.")
            scores = known[name]().score(subject)
            flat = torch.cat([scores[site.name] for site in subject.sites])
            total += weight * (_z_scores(flat) if self.by == "z-score" else places(flat))
        parts = total.split([site.units for site in subject.sites])
        return {site.name: part for site, part in zip(subject.sites, parts, strict=True)}


def _z_scores(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / scores.std(correction=0).clamp_min(1e-300)
