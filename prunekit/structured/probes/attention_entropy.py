"""Attention entropy of every head of a model, from queries and keys, summed over batches.

Shapes: B samples, T tokens, S queries, H query heads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from prunekit_kernels import Entropy, attention_entropy
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.models.attention_hook import Observer, observed
from prunekit.models.units.heads_neurons import Site
from prunekit.structured.batches import Batch, valid_tokens


def measure(
    model: PreTrainedModel,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    ranks: Ranks = SINGLE,
) -> dict[str, Entropy]:
    """Return the entropies of each site's query heads, in nats, with the highest they could be.

    Queries that are padding do not count; keys that are padding are seen by none. ``ranks`` have
    the other batches.
    """
    sums: dict[str, Entropy] = {}
    for batch in batches:
        observers = {
            site.module: _adding(
                sums, site.name, valid_tokens(batch, decodes=site.stack.reads is not None)
            )
            for site in sites
        }
        with observed(model, observers), torch.no_grad():
            model(**batch)
    for part in (part for found in sums.values() for part in found):
        ranks.all_reduce_sum(part, "scores")
    return sums


def _split(mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the mask of truth values and what is added to the scores."""
    if mask is None or mask.dtype == torch.bool:
        return mask, bias
    return None, mask if bias is None else mask + bias


def _adding(sums: dict[str, Entropy], name: str, valid: Tensor | None) -> Observer:
    def observe(
        module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, given: dict[str, Any]
    ) -> None:
        hidden, bias = _split(mask, given.get("position_bias"))
        causal = given.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        new = attention_entropy(
            query,
            key,
            scale=given.get("scaling"),
            causal=bool(causal) and mask is None and query.shape[2] > 1,
            soft_cap=given.get("softcap"),
            mask=hidden,
            bias=bias,
            valid=valid,
        )
        old = sums.get(name, (0, 0, 0))
        sums[name] = Entropy(*(a + b for a, b in zip(old, new, strict=True)))

    return observe
