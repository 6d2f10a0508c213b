"""Gram matrix of some samples, to estimate an error at less cost."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from prunekit.statistics.base import S, Statistic
from prunekit.statistics.gram import Gram


class SampledGram(Gram):
    """``Σ x[t] x[t]ᵀ`` over every fourth sample.

    It uses whole samples, because the first tokens of a sample tend to be far larger than the
    others; so their share is the same as among all tokens.
    """

    name: ClassVar[str] = "sampled_gram"
    sample_stride: ClassVar[int] = 4

    @classmethod
    @override
    def contains(cls) -> frozenset[type[Statistic]]:
        return frozenset()  # its sums are not of all tokens

    @override
    def derive(self, kind: type[S]) -> S | None:
        return None
