"""Inputs of the modules that read units, and their gradients.

Shapes: B samples, T tokens, I inputs of a linear, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from prunekit.structured.batches import Batch, run_hooked, valid_tokens

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
        run_hooked(gated.forward.run, batch, handles)


def _observing(
    group: LinearUnitGroup,
    valid: Tensor | None,
    observe: Callable[[LinearUnitGroup, Tensor], None],
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Return a hook that passes on the valid rows."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2)
        observe(group, rows if valid is None else rows[valid.flatten().to(rows.device)])

    return hook


def activations_and_gradients(
    gated: GatedModel, batch: Batch, modules: Sequence[nn.Module], *, outputs: bool = False
) -> tuple[list[Float[Tensor, "B T I"]], list[Float[Tensor, "B T I"]], Float[Tensor, " B"]]:
    """Return modules' inputs, their gradients, and each sample's number of predictions.

    The loss is summed over the predictions. Each module's input is the one after its gate.

    Args:
        gated: The model and its gates.
        batch: The batch to run.
        modules: The modules.
        outputs: Return the modules' outputs [B, T, O] and the gradients by those instead.
    """
    tensors: dict[nn.Module, Tensor] = {}
    observed: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        tensors[module] = output if outputs else inputs[0]

    def forward_done() -> list[Tensor]:
        # Before the backward: checkpointing runs the forward and its hooks again in it.
        observed.extend(tensors[module] for module in modules)
        return observed

    with ExitStack() as stack:
        for gate in gated.gates.values():
            # A gate that requires a gradient passes it on, even if all weights are frozen.
            stack.enter_context(gate.holding(gate.value.detach().clone().requires_grad_()))
        for module in modules:
            stack.callback(module.register_forward_hook(record).remove)
        gradients, predictions = gated.forward.gradients(batch, forward_done)
    return [each.detach() for each in observed], gradients, predictions
