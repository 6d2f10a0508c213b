"""What single heads do on a few tokens: where they look, and how much passes their gates.

Here, and only here, a matrix of queries by keys is made, of so few tokens that it can be drawn.

Shapes: T tokens, H query heads, S queries, K keys, D features of a head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.models.attention_hook import observed
from prunekit.models.units.heads_neurons import Site, matrix
from prunekit.structured.batches import Batch, run_hooked

Head = tuple[Site, int]
"""A query head of a site."""


def attention_maps(
    model: PreTrainedModel, heads: Sequence[Head], batch: Batch
) -> list[Float[Tensor, "S K"]]:
    """Return the attention probabilities of some heads on the first sample, on the CPU."""
    found: dict[nn.Module, Tensor] = {}

    def observe(
        module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, given: dict[str, Any]
    ) -> None:
        found[module] = _probabilities(module, query, key, mask, given)[0].cpu()

    observers = {site.module: observe for site, _ in heads}
    with observed(model, observers), torch.no_grad():
        model(**batch)
    return [found[site.module][head] for site, head in heads]


def _probabilities(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, given: dict[str, Any]
) -> Float[Tensor, "B H S K"]:
    query, key = query.float(), key.float()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = given.get("scaling")
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if cap := given.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    if (bias := given.get("position_bias")) is not None:
        scores = scores + bias
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and causal and query.shape[2] > 1:
        ahead = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(ahead, -torch.inf)
    elif mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1)


def activity(model: PreTrainedModel, heads: Sequence[Head], batch: Batch) -> Float[Tensor, "N T"]:
    """Return ``‖W x‖₂`` of what some heads give at each token of the first sample, on the CPU.

    W are the columns of the linear that reads the head, x what it reads after the gate.
    """
    found: list[Tensor] = [torch.empty(0)] * len(heads)

    def showing(place: int, site: Site, head: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        columns = site.reader.index.flatten(0, 1)[head]

        def show(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0][0] if inputs[0].ndim == 3 else inputs[0]
            weight = matrix(site.reader.linear)[:, columns.to(x.device)].float()
            read = x[:, columns.to(x.device)].float()
            found[place] = (read @ weight.T).norm(dim=1).cpu()

        return show

    handles = [
        site.reader.linear.register_forward_pre_hook(showing(place, site, head))
        for place, (site, head) in enumerate(heads)
    ]
    run_hooked(model, batch, handles)
    return torch.stack(found)
