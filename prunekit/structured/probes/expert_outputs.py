"""Sums over the tokens that a router sends to each expert.

Shapes: T tokens, K experts per token, U experts, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from prunekit.models.units.expert_gate import routing
from prunekit.structured.batches import valid_tokens

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from prunekit.models.units.experts import ExpertGroup
    from prunekit.structured.batches import Batch
    from prunekit.structured.gated_model import GatedModel


class ExpertSums(NamedTuple):
    """Sums over the routed tokens of each expert of a layer.

    They are float64, on the CPU.

    Attributes:
        tokens: Number of all tokens of the layer.
        routed: Number of tokens of each expert.
        shares: Sum of the shares with which they count.
        outputs: Sum of the shares times the norm of the expert's output; 0 where not asked for.
    """

    tokens: float
    routed: Float[Tensor, " U"]
    shares: Float[Tensor, " U"]
    outputs: Float[Tensor, " U"]


def expert_sums(gated: GatedModel, *, outputs: bool) -> dict[str, ExpertSums]:
    """Return the sums of each group, over all batches and ranks.

    Args:
        gated: The model, its groups of experts and the batches; padding is left out.
        outputs: Sum the norms of outputs too.
    """
    groups = cast("list[ExpertGroup]", gated.groups)
    sums = {
        group.name: torch.zeros(3, group.units, dtype=torch.float64, device=gated.device)
        for group in groups
    }
    for batch in gated.batches:
        with ExitStack() as stack:
            for group in groups:
                stack.enter_context(_observed(group, batch, sums[group.name], outputs=outputs))
            gated.forward.run(batch)
    gated.all_reduce_sums(sums.values())
    return {
        group.name: ExpertSums(float(routed.sum()) / group.router.top_k, routed, shares, norms)
        for group in groups
        for routed, shares, norms in [sums[group.name].cpu()]
    }


@contextmanager
def _observed(
    group: ExpertGroup, batch: Batch, sums: Float[Tensor, "3 U"], *, outputs: bool
) -> Iterator[None]:
    """Add to the sums whenever the experts of a group run.

    With outputs each pair of token and expert runs as a token of its own with one expert, and the
    outputs are added up here: every expert runs as often as before.
    """
    module: Any = group.module
    valid = valid_tokens(batch, decodes=group.stack.reads is not None)
    own = vars(module).get("forward")
    forward: Callable[..., Tensor] = module.forward

    def run(*inputs: Tensor) -> Tensor:
        hidden, chosen, shares = routing(group.name, inputs)
        if not outputs:
            _add(sums, (chosen, shares, torch.zeros_like(shares)), valid)
            return forward(*inputs)
        rows = hidden.reshape(-1, hidden.shape[-1]).repeat_interleave(chosen.shape[1], 0)
        one = torch.ones_like(shares).view(-1, 1)
        each = forward(rows, chosen.reshape(-1, 1), one).view(*chosen.shape, -1)
        _add(sums, (chosen, shares, shares * each.float().norm(dim=-1)), valid)
        return (each * shares[..., None]).sum(1).to(each).view_as(hidden)

    module.forward = run
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _add(
    sums: Float[Tensor, "3 U"],
    routed: tuple[Int[Tensor, "T K"], Float[Tensor, "T K"], Float[Tensor, "T K"]],
    valid: Bool[Tensor, "B T"] | None,
) -> None:
    """Add the routing of some tokens to the sums.

    Args:
        sums: The sums.
        routed: Chosen experts, shares and further values.
        valid: Tokens that count; None for all.
    """
    chosen, *values = (
        each if valid is None else each[valid.flatten().to(each.device)] for each in routed
    )
    ones = torch.ones_like(values[0])
    for row, value in zip(sums, (ones, *values), strict=True):
        row.index_add_(0, chosen.flatten().to(row.device), value.flatten().to(row))
