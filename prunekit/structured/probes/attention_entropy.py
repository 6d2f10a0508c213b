"""Attention entropy of every head of a model, summed over batches.

Shapes: B samples, T tokens, S queries, H query heads.
"""

from typing import Any

import torch
from prunekit_kernels import Entropy, attention_entropy
from torch import Tensor, nn

from prunekit.models.attention_hook import Observer, observe_attention
from prunekit.structured.batches import valid_tokens
from prunekit.structured.gated_model import GatedModel


def head_entropies(gated: GatedModel) -> dict[str, Entropy]:
    """Return the attention entropy of each query head, by group.

    Entropies are in nats, with the maximum that they could reach.
    Queries that are padding do not count; keys that are padding are visible to no query.

    Args:
        gated: The model in eval mode, its groups of heads, and the batches.
    """
    sums: dict[str, Entropy] = {}
    for batch in gated.batches:
        observers = {
            group.module: _accumulate(
                sums, group.name, valid_tokens(batch, decodes=group.stack.reads is not None)
            )
            for group in gated.groups
        }
        with observe_attention(gated.model, observers):
            gated.forward.run(batch)
    for part in (part for entropy in sums.values() for part in entropy):
        gated.ranks.all_reduce_sum(part, "scores")
    return sums


def _split(mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the boolean mask and the additive bias."""
    if mask is None or mask.dtype == torch.bool:
        return mask, bias
    return None, mask if bias is None else mask + bias


def _accumulate(sums: dict[str, Entropy], name: str, valid: Tensor | None) -> Observer:
    """Return an observer that adds entropies to the sums."""

    def observe(
        module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> None:
        visible, bias = _split(mask, options.get("position_bias"))
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        new = attention_entropy(
            query,
            key,
            scale=options.get("scaling"),
            causal=bool(causal) and mask is None and query.shape[2] > 1,
            soft_cap=options.get("softcap"),
            mask=visible,
            bias=bias,
            valid=None if valid is None else valid.to(query.device),
        )
        old = sums.get(name, (0, 0, 0))
        sums[name] = Entropy(*(a + b for a, b in zip(old, new, strict=True)))

    return observe
