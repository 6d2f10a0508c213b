"""A pattern that chooses among the weights that are kept already.

Shapes: O output features, I input features, C columns chosen together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from jaxtyping import Bool, Float
from prunekit_kernels import packed_mask
from typing_extensions import override

from prunekit.patterns import Pattern, WeightScope

if TYPE_CHECKING:
    from torch import Tensor


class KeptPattern(Pattern):
    """Another pattern, of which weights pruned before are pruned first.

    So the exact count of each group holds, unless more were pruned before; those stay pruned.
    """

    spelling: ClassVar[str] = "none: made from a pattern of the config, never written in one"

    def __init__(self, pattern: Pattern, kept: Bool[Tensor, "O I"]) -> None:
        self.name, self.stride, self.tiled = pattern.name, pattern.stride, pattern.tiled
        self.pattern, self.kept = pattern, kept

    @classmethod
    @override
    def parse(cls, text: str, scope: WeightScope) -> Self | None:
        return None

    @override
    def keep(self, score: Float[Tensor, "O I"], sparsity: float) -> Bool[Tensor, "O I"]:
        return self.pattern.keep(self._lowered(score, self.kept), sparsity) & self.kept

    @override
    def keep_columns(
        self, score: Float[Tensor, "O C"], start: int, sparsity: float
    ) -> Bool[Tensor, "O C"]:
        kept = self.kept[:, start : start + score.shape[1]]
        return self.pattern.keep_columns(self._lowered(score, kept), start, sparsity) & kept

    def _lowered(
        self, score: Float[Tensor, "O C"], kept: Bool[Tensor, "O C"]
    ) -> Float[Tensor, "O C"]:
        """Return scores in which pruned weights are the lowest."""
        # A tile is compared by its sum, which -inf of one weight would decide.
        return packed_mask.kept(score, kept, 0.0 if self.tiled else -float("inf"))
