"""Modules that read units, with the moments of their weights.

Shapes: U units of a group, I inputs of a module.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from prunekit_kernels import apt_score, new_state, weight_moments

from prunekit.architectures import find_architecture
from prunekit.architectures.coverage import LINEAR_TYPES
from prunekit.models.adapters import effective_weight
from prunekit.models.orientation import stored_axis
from prunekit.models.units.hidden import HiddenGroup
from prunekit.structured.probes.token_windows import Observed

if TYPE_CHECKING:
    from typing import Literal

    from jaxtyping import Float
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from prunekit.models.units.base import UnitGroup
    from prunekit.models.units.heads_neurons import LinearUnitGroup


@dataclass(frozen=True)
class UnitReading:
    """How the units of a group are read.

    Attributes:
        modules: The modules that read them.
        width: Inputs of a unit.
        moments: Moments of the weights that read them, [10 I]; those of no weight add no kurtosis.
        constant: Added to each score, [U].
    """

    modules: list[Observed]
    width: int
    moments: Tensor
    constant: Tensor

    def score(
        self,
        states: Iterable[Float[Tensor, "10 I"]],
        tokens: int,
        product: Literal["sums", "elements"],
    ) -> Float[Tensor, " U"]:
        """Return the salience of the units, float64 on the CPU.

        Args:
            states: State of :func:`prunekit_kernels.salience` for each module.
            tokens: Σ|h| is scaled to so many tokens.
            product: Product of the two sums, or the sum of products.
        """
        total = self.constant.clone()
        for state in states:
            scaled = state.to(self.moments.device, copy=True)
            scaled[5] *= tokens / state[0].clamp_min(1)
            total += apt_score(scaled, self.moments, width=self.width, product=product)
        return total.cpu()


def unit_readings(
    model: PreTrainedModel, groups: Iterable[UnitGroup], *, outliers: bool
) -> dict[str, UnitReading]:
    """Return how each group is read, by its name.

    Args:
        model: The model.
        groups: Its groups.
        outliers: False leaves out the kurtosis of weights.
    """
    return {
        group.name: _of_coordinates(model, group, outliers=outliers)
        if isinstance(group, HiddenGroup)
        else _of_linear(cast("LinearUnitGroup", group), outliers=outliers)
        for group in groups
    }


def _of_linear(group: LinearUnitGroup, *, outliers: bool) -> UnitReading:
    """Return how heads or neurons are read: by one linear."""
    linear = group.reader.linear
    moments = _moments(linear)
    if not outliers:
        moments = new_state(moments.shape[1], moments.device)
    constant = torch.zeros(group.units, dtype=torch.float64, device=moments.device)
    observed = Observed(linear, group.stack.reads is not None)
    return UnitReading([observed], group.features_per_unit, moments, constant)


def _of_coordinates(model: PreTrainedModel, group: HiddenGroup, *, outliers: bool) -> UnitReading:
    """Return how coordinates of the residual stream are read: by the norms."""
    decoders = {
        module
        for stack in find_architecture(model).stacks
        if stack.reads is not None
        for module in model.base_model.get_submodule(stack.module).modules()
    }
    constant = torch.zeros(group.units, dtype=torch.float64, device=group.device)
    for axis in group.axes if outliers else ():
        if isinstance(axis.module, LINEAR_TYPES) and axis.axis == stored_axis(axis.module, 1):
            constant += apt_score(_moments(axis.module), None)
    norms = [Observed(norm, norm in decoders) for norm in dict.fromkeys(group.norms)]
    return UnitReading(norms, 1, new_state(group.units, group.device), constant)


def _moments(linear: nn.Module) -> Float[Tensor, "10 I"]:
    """Return the moments of the weights of each input."""
    return weight_moments(effective_weight(linear).float())
