"""What the linears that read units see while a model runs.

Shapes: T tokens, I inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from prunekit.probes.batches import valid_tokens

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from prunekit.rankers.base import Subject
    from prunekit.sites import Site


def look(
    subject: Subject, see: Callable[[Site, Float[Tensor, "T I"]], None], *, gated: bool = True
) -> None:
    """Run the batches and show what the linear of each site reads, padding left out.

    ``gated``: as it is after the gates; otherwise as it is before its own.
    """
    for batch in subject.batches:
        handles = [
            site.reader.linear.register_forward_pre_hook(
                _showing(site, valid_tokens(batch, decodes=site.stack.reads is not None), see),
                prepend=not gated,
            )
            for site in subject.sites
        ]
        try:
            with torch.no_grad():
                subject.model(**batch)
        finally:
            for handle in handles:
                handle.remove()


def _showing(
    site: Site, valid: Tensor | None, see: Callable[[Site, Tensor], None]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2)
        see(site, rows if valid is None else rows[valid.flatten()])

    return hook
