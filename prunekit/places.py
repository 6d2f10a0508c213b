"""Where the units of each kind are."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from prunekit.depth import depths
from prunekit.kinds import Kind
from prunekit.sites import Place, sites
from prunekit.width import widths


def places(model: PreTrainedModel, kind: Kind) -> Sequence[Place]:
    """Return where the units of one kind are, in run order.

    Raises:
        CheckpointError: The family is not declared, or not with what this kind needs.
        ShapeError: Its coordinates cannot be taken out; the message names the constraint.
    """
    if kind == "blocks":
        return depths(model)
    return widths(model) if kind == "hidden" else sites(model, kind)
