"""Attention entropy: heads that look everywhere alike go first."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from prunekit.models.units.kinds import Kind
from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker

if TYPE_CHECKING:
    from prunekit_kernels import Entropy
    from torch import Tensor


class AttentionEntropy(Ranker):
    """``− Σ Hᵢ / Σ ln nᵢ``: entropy of rows, over the highest it could be with nᵢ visible keys.

    Rows of causal attention see 1, 2, 3 … keys, so that a plain mean would compare unlike things.
    Of heads that share a key head the mean counts. A head that only looks at the first token has an
    entropy of 0 and stays, though it may do nothing: combine this with what a head gives.
    """

    name: ClassVar[str] = "entropy"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"heads"})

    normalised: bool = True
    """False for the mean over rows in nats."""

    @override
    def score(self, subject: GatedModel) -> Scores:
        from prunekit.structured.probes.attention_entropy import measure

        found = measure(subject.model, subject.sites, subject.batches, subject.ranks)
        return {
            site.name: -self._mean(found[site.name]).view(site.units, -1).mean(1).cpu()
            for site in subject.sites
        }

    def _mean(self, found: Entropy) -> Tensor:
        # No key to choose from, no entropy: not 0 / 0.
        return found.entropy / (found.log_keys if self.normalised else found.rows).clamp_min(1e-12)
