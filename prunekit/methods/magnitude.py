"""Magnitude: prune the smallest weights."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from prunekit.methods.base import ScaledMagnitude, ScoreFactors
from prunekit.methods.layer import Layer
from prunekit.patterns import WeightScope


class Magnitude(ScaledMagnitude):
    """``|W|``, compared within each layer; no calibration (Han et al., arXiv:1506.02626)."""

    name: ClassVar[str] = "magnitude"
    scope: ClassVar[WeightScope] = "layer"

    @override
    def factors(self, layer: Layer) -> ScoreFactors:
        return ScoreFactors()
