"""Where the units of each kind are."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from prunekit.models.units.base import UnitGroup
from prunekit.models.units.blocks import depths
from prunekit.models.units.heads_neurons import sites
from prunekit.models.units.hidden import widths
from prunekit.models.units.kinds import Kind


def places(model: PreTrainedModel, kind: Kind) -> Sequence[UnitGroup]:
    """Return where the units of one kind are, in run order.

    Raises:
        CheckpointError: The family is not declared, or not with what this kind needs.
        ShapeError: Its coordinates cannot be taken out; the message names the constraint.
    """
    if kind == "blocks":
        return depths(model)
    return widths(model) if kind == "hidden" else sites(model, kind)
