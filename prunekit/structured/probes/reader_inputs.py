"""Inputs of the linears that read units, and their gradients.

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

    from prunekit.models.units.heads_neurons import LinearUnitGroup
    from prunekit.structured.gated_model import GatedModel


def observe_inputs(
    gated: GatedModel,
    observe: Callable[[LinearUnitGroup, Float[Tensor, "T I"]], None],
    *,
    after_gates: bool = True,
) -> None:
    """Run the batches and observe the input of each reader.

    Args:
        gated: The model, its groups and the batches.
        observe: Called with a group and the input rows of its reader, padding excluded.
        after_gates: Pass the input after the gate; otherwise the one before the group's own gate.
    """
    for batch in gated.batches:
        handles = [
            group.reader.linear.register_forward_pre_hook(
                _observing(
                    group, valid_tokens(batch, decodes=group.stack.reads is not None), observe
                ),
                prepend=not after_gates,
            )
            for group in gated.groups
        ]
        run_hooked(gated.model, batch, handles)


def _observing(
    group: LinearUnitGroup,
    valid: Tensor | None,
    observe: Callable[[LinearUnitGroup, Tensor], None],
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Return a hook that passes on the valid rows."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2)
        observe(group, rows if valid is None else rows[valid.flatten()])

    return hook


def inputs_and_gradients(
    gated: GatedModel, batch: Batch, *, outputs: bool
) -> tuple[list[Float[Tensor, "B T I"]], list[Float[Tensor, "B T I"]], Float[Tensor, " B"]]:
    """Return readers' inputs, their gradients, and each sample's number of predictions.

    The loss is summed over the predictions.

    Args:
        gated: The model and its groups.
        batch: The batch to run.
        outputs: Return the reader's output [B, T, O] and the gradient by that instead.
    """
    tensors: dict[str, Tensor] = {}

    def recording(group: LinearUnitGroup):  # noqa: ANN202
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            tensors[group.name] = output if outputs else inputs[0]

        return hook

    with ExitStack() as stack, torch.enable_grad():
        for group in gated.groups:
            # A gate that requires a gradient passes it on, even if all weights are frozen.
            gate = gated.gates[group.name]
            stack.enter_context(gate.holding(gate.value.detach().clone().requires_grad_()))
            stack.callback(group.reader.linear.register_forward_hook(recording(group)).remove)
        loss, predictions = losses(gated.model, batch)
        observed = [tensors[group.name] for group in gated.groups]
        gradients = torch.autograd.grad(loss.sum(), observed)
    return [each.detach() for each in observed], [*gradients], predictions
