"""Magnitude: small weights go."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from prunekit.methods.base import Factors, Weighed
from prunekit.methods.layer import Layer
from prunekit.patterns import Scope


class Magnitude(Weighed):
    """``|W|``; needs no calibration (Han et al., arXiv:1506.02626), per layer as in Wanda."""

    name: ClassVar[str] = "magnitude"
    scope: ClassVar[Scope] = "layer"

    @override
    def factors(self, layer: Layer) -> Factors:
        return Factors()
