"""Gram matrix of some samples: enough to tell an error by, at a fraction of the products."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from prunekit.statistics.base import S, Statistic
from prunekit.statistics.gram import Gram


class SampledGram(Gram):
    """``Σ x[t] x[t]ᵀ`` over every fourth sample.

    Of whole samples, as tokens at their beginning tend to be far larger than the others, and are to
    weigh here what they weigh among all.
    """

    name: ClassVar[str] = "sampled_gram"
    every: ClassVar[int] = 4

    @classmethod
    @override
    def contains(cls) -> frozenset[type[Statistic]]:
        return frozenset()  # it has not seen all tokens

    @override
    def derive(self, kind: type[S]) -> S | None:
        return None
