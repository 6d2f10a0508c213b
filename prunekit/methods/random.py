"""Random: the baseline that every method has to beat."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from typing_extensions import override

from prunekit.methods.base import Scored
from prunekit.methods.layer import Layer
from prunekit.patterns import WeightScope

if TYPE_CHECKING:
    from torch import Tensor


class Random(Scored):
    """Uniform scores from a generator seeded by ``random_seed`` and the layer's name."""

    name: ClassVar[str] = "random"
    scope: ClassVar[WeightScope] = "layer"

    random_seed: int = 0
    """Seed of the scores; each layer has its own, independent of layer order and device."""

    @override
    def score(self, layer: Layer) -> Float[Tensor, "O I"]:
        import torch

        digest = hashlib.sha256(f"{self.random_seed} {layer.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        outputs, inputs = layer.weight.shape
        start = layer.rows.start if layer.rows else 0
        scores = torch.rand((layer.outputs, inputs), generator=generator)
        return scores[start : start + outputs].to(layer.weight.device)
