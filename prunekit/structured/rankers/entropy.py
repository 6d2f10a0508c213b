"""Attention entropy: prune heads with nearly uniform attention first."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from typing_extensions import override

from prunekit.models.units.kinds import Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Cost, Ranker

if TYPE_CHECKING:
    from prunekit_kernels import Entropy
    from torch import Tensor

    from prunekit.models.units.base import UnitGroup
    from prunekit.models.units.heads_neurons import LinearUnitGroup


class AttentionEntropy(Ranker):
    """``− Σ Hᵢ / Σ ln nᵢ``: entropy of the rows over its maximum with nᵢ visible keys.

    Rows of causal attention see 1, 2, 3 … keys, so a plain mean would mix different scales. Heads
    that share a key head are averaged. A head that attends only to the first token has entropy 0
    and is kept, although it may have no effect: combine this with a ranker of head outputs.
    """

    name: ClassVar[str] = "entropy"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"heads"})

    normalised: bool = True
    """False: the mean over rows, in nats."""

    @override
    def score(self, gated: GatedModel) -> Scores:
        from prunekit.structured.probes.attention_entropy import head_entropies

        entropies = head_entropies(gated)
        return {
            group.name: -self._mean(entropies[group.name]).view(group.units, -1).mean(1).cpu()
            for group in gated.groups
        }

    @override
    def cost(self, group: UnitGroup, length: int) -> Cost:
        # Products of a query with the half of the keys that it sees.
        return Cost(token_flops=length * cast("LinearUnitGroup", group).reader.index.numel())

    def _mean(self, sums: Entropy) -> Tensor:
        # With one visible key both are 0: return 0, not 0 / 0.
        return sums.entropy / (sums.log_keys if self.normalised else sums.rows).clamp_min(1e-12)
