"""Unit groups of a model by kind."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from prunekit.models.units.base import UnitGroup
from prunekit.models.units.blocks import block_groups
from prunekit.models.units.heads_neurons import linear_groups
from prunekit.models.units.hidden import hidden_groups
from prunekit.models.units.kinds import Kind


def unit_groups(model: PreTrainedModel, kind: Kind) -> Sequence[UnitGroup]:
    """Return the groups of units of one kind, in run order.

    Raises:
        CheckpointError: The family is not declared, or without the units of this kind.
        ShapeError: Coordinates cannot be removed; the message names the constraint.
    """
    if kind == "blocks":
        return block_groups(model)
    return hidden_groups(model) if kind == "hidden" else linear_groups(model, kind)
