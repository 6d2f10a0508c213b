"""Attention maps and output norms of single heads, for figures.

Only this module computes a matrix of queries by keys, for few enough tokens to be drawn.

Shapes: B samples, T tokens, H query heads, S queries, K keys, N heads to be shown.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.models.adapters import effective_weight
from prunekit.models.attention_hook import observe_attention
from prunekit.models.units.heads_neurons import LinearUnitGroup

Head = tuple[LinearUnitGroup, int]
"""A query head: its group and its index among the query heads of the attention."""


@contextmanager
def attention_maps(
    model: PreTrainedModel, heads: Sequence[Head]
) -> Iterator[Callable[[], list[Float[Tensor, "S K"]]]]:
    """Observe attention probabilities of the first sample in a context.

    Args:
        model: In eval mode; run in the context, as a whole or block by block.
        heads: The heads.

    Yields:
        A function that returns the map of each head, on the CPU.
    """
    probabilities: dict[nn.Module, Tensor] = {}

    def observe(
        module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> None:
        probabilities[module] = _probabilities(module, query, key, mask, options)[0].cpu()

    observers = {group.module: observe for group, _ in heads}
    with observe_attention(model, observers):
        yield lambda: [probabilities[group.module][head] for group, head in heads]


def _probabilities(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Float[Tensor, "B H S K"]:
    """Return the attention probabilities of a call, as eager attention computes them."""
    query, key = query.float(), key.float()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = options.get("scaling")
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    if (bias := options.get("position_bias")) is not None:
        scores = scores + bias
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and causal and query.shape[2] > 1:
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    elif mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1)


@contextmanager
def head_output_norms(heads: Sequence[Head]) -> Iterator[Callable[[], Float[Tensor, "N T"]]]:
    """Observe ``‖W x‖₂`` of heads at each token in a context.

    W are the columns of the reader that belong to the head, x its input after the gate.

    Args:
        heads: Heads of a model that is run in the context, as a whole or block by block.

    Yields:
        A function that returns the norms in the first sample, on the CPU.
    """
    norms: list[Tensor] = [torch.empty(0)] * len(heads)

    def record(
        index: int, group: LinearUnitGroup, head: int
    ) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        columns = group.reader.index.flatten(0, 1)[head]

        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0][0] if inputs[0].ndim == 3 else inputs[0]
            weight = effective_weight(group.reader.linear)[:, columns.to(x.device)].float()
            norms[index] = (x[:, columns.to(x.device)].float() @ weight.T).norm(dim=1).cpu()

        return hook

    with ExitStack() as stack:
        for index, (group, head) in enumerate(heads):
            hook = record(index, group, head)
            stack.callback(group.reader.linear.register_forward_pre_hook(hook).remove)
        yield lambda: torch.stack(norms)
