"""Removal of heads from shared position biases.

In T5-like families the first block of a stack computes one bias with a column per head, and every
attention of the stack adds it to its scores. As long as blocks keep different heads, the bias keeps
all columns and each attention selects its own through ``kept_heads`` in our attention function.
Once all blocks keep the same heads, the columns themselves are removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from prunekit.architectures import Attention
from prunekit.models.attention_hook import use_hooked_attention
from prunekit.models.units.narrowing import narrow_parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunekit.models.units.heads_neurons import LinearUnitGroup


def bias_columns(module: nn.Module, keep: Sequence[int]) -> list[int]:
    """Return the bias columns of some heads, counted as before any removal."""
    before = getattr(module, "kept_heads", None)
    return list(keep) if before is None else [before[head] for head in keep]


def select_bias_columns(module: Any, declared: Attention, keep: Sequence[int]) -> None:  # noqa: ANN401
    """Make an attention use the columns of the kept heads only.

    Args:
        module: The attention.
        declared: Its declaration. An empty ``bias`` means a bias of zeros.
        keep: The kept heads, counted as the attention has them now.
    """
    # An attribute, not a buffer: transformers leaves buffers that no file holds uninitialised.
    # One column of a bias of zeros serves all heads.
    module.kept_heads = bias_columns(module, keep if declared.bias else [0])


def narrow_bias(module: Any, declared: Attention) -> None:  # noqa: ANN401
    """Remove the bias columns of removed heads.

    Valid only when all attentions of the stack keep the same heads.

    Args:
        module: The attention; only the first one of a stack holds the embedding.
        declared: Its declaration.
    """
    embedding = getattr(module, declared.bias or "", None)
    if isinstance(embedding, nn.Embedding):
        keep = torch.tensor(module.kept_heads)
        weight = cast("nn.Parameter", embedding.weight)
        embedding.weight = narrow_parameter(weight, 1, keep)
        embedding.embedding_dim = len(keep)
    del module.kept_heads


def select_position_biases(model: PreTrainedModel, groups: Sequence[LinearUnitGroup]) -> None:
    """Let blocks with different heads select their columns in our attention function.

    Raises:
        CheckpointError: This transformers computes such an attention by itself.
    """
    for group in groups:
        group.check_unequal()
    if any(group.bias_attention for group in groups):
        use_hooked_attention(model)
