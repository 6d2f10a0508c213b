"""What the linears that read units see while a model runs, and how much the loss minds it.

Shapes: B samples, T tokens, I inputs of a linear, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from prunekit.structured.batches import Batch, losses, run_hooked, valid_tokens

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from prunekit.models.units.heads_neurons import Site
    from prunekit.structured.gated_model import GatedModel


def observe_inputs(
    subject: GatedModel, see: Callable[[Site, Float[Tensor, "T I"]], None], *, gated: bool = True
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
        run_hooked(subject.model, batch, handles)


def _showing(
    site: Site, valid: Tensor | None, see: Callable[[Site, Tensor], None]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2)
        see(site, rows if valid is None else rows[valid.flatten()])

    return hook


def inputs_and_gradients(
    subject: GatedModel, batch: Batch, *, outputs: bool
) -> tuple[list[Float[Tensor, "B T I"]], list[Float[Tensor, "B T I"]], float]:
    """Return what the linear of each site reads, the loss's gradient by it, and the predictions.

    The loss is the sum over these. ``outputs``: of what the linear gives instead, [B, T, O].
    """
    found: dict[str, Tensor] = {}

    def keeping(site: Site):  # noqa: ANN202
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[site.name] = output if outputs else inputs[0]

        return hook

    with ExitStack() as held, torch.enable_grad():
        for site in subject.sites:
            # What a gate that wants a gradient gives has one, though weights may be frozen.
            gate = subject.gates[site.name]
            held.enter_context(gate.holding(gate.value.detach().clone().requires_grad_()))
            held.callback(site.reader.linear.register_forward_hook(keeping(site)).remove)
        loss, predictions = losses(subject.model, batch)
        seen = [found[site.name] for site in subject.sites]
        gradients = torch.autograd.grad(loss.sum(), seen)
    return [each.detach() for each in seen], [*gradients], float(predictions.sum())
