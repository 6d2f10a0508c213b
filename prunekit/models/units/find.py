"""Unit groups of a model by kind."""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from prunekit.architectures.adapters import without_adapters
from prunekit.errors import ConfigError
from prunekit.models.units.adapter_axes import adapter_axes
from prunekit.models.units.base import UnitGroup
from prunekit.models.units.blocks import block_groups
from prunekit.models.units.experts import expert_groups
from prunekit.models.units.heads_neurons import linear_groups
from prunekit.models.units.hidden import hidden_groups
from prunekit.models.units.kinds import Kind


def unit_groups(model: PreTrainedModel, kind: Kind) -> Sequence[UnitGroup]:
    """Return the groups of units of one kind, in run order.

    The parts of low-rank adapters of peft belong to the units whose linears they adapt.

    Raises:
        CheckpointError: The family is not declared, or without the units of this kind.
        ConfigError: An adapter has no parts that belong to units.
        ShapeError: Coordinates or experts cannot be removed; the message names the constraint.
    """
    if kind == "blocks":
        return block_groups(model)
    if kind == "experts":
        return expert_groups(model)
    if kind != "hidden":
        return linear_groups(model, kind)
    with without_adapters(model):
        (group,) = hidden_groups(model)
    added = adapter_axes(model, group)
    return [replace(group, axes=(*group.axes, *added), distinct=(*group.distinct, *added))]


def check_current(model: PreTrainedModel, groups: Sequence[UnitGroup]) -> None:
    """Refuse groups that were found before adapters were added or taken out.

    Args:
        model: The model as it is now.
        groups: All groups of one kind.

    Raises:
        ConfigError: The model's groups have other parameters now.
    """
    kind = groups[0].kind
    before, now = (
        [axis.parameter for group in each for axis in group.parameter_axes]
        for each in (groups, unit_groups(model, kind))
    )
    if len(before) != len(now) or any(a is not b for a, b in zip(before, now, strict=True)):
        raise ConfigError(
            f"{kind}: adapters were added or taken out since the gates were made, so these do not "
            f"act on them. Call prunekit.{kind}(model).relocate() first."
        )
