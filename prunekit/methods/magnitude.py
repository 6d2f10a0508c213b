"""Magnitude: small weights go."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from typing_extensions import override

from prunekit.layer import Layer
from prunekit.methods.base import Scored
from prunekit.patterns import Scope

if TYPE_CHECKING:
    from torch import Tensor


class Magnitude(Scored):
    """``|W|``; needs no calibration (Han et al., arXiv:1506.02626), per layer as in Wanda."""

    name: ClassVar[str] = "magnitude"
    scope: ClassVar[Scope] = "layer"

    @override
    def score(self, layer: Layer) -> Float[Tensor, "O I"]:
        return layer.weight.abs()
