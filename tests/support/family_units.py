"""Units of a tiny model of any family, removed and compared with closed gates.

Shapes: B samples, T tokens.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

import prunekit
from prunekit.checkpoint.reader import Checkpoint
from prunekit.errors import PrunekitError
from prunekit.models.stock import feature_shape, random_features
from prunekit.models.units.find import unit_groups
from prunekit.models.units.kinds import KINDS, Kind
from prunekit.models.units.stored_removal import check_whole

NEAR = 1e-4
"""Difference relative to the largest output that rounding explains."""


@torch.no_grad()
def answers(model: PreTrainedModel, ids: Tensor | Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Return the outputs of a model for tokens; a decoder reads them too.

    Of several batches of named inputs, return those of the last one.
    """
    if not isinstance(ids, Tensor):
        return [model(**batch)[0] for batch in ids][-1]
    if not model.config.is_encoder_decoder:
        return model(input_ids=ids)[0]
    if shape := feature_shape(model.get_encoder()):
        features = random_features(ids, shape)
        return model(input_features=features, decoder_input_ids=ids)[0]
    return model(input_ids=ids, decoder_input_ids=ids)[0]


def removable(model: PreTrainedModel, checkpoint: Checkpoint) -> list[Kind]:
    """Return the kinds of units that can be removed from a checkpoint.

    Args:
        model: Its model without weights.
        checkpoint: The checkpoint.
    """
    found: list[Kind] = []
    for kind in KINDS:
        try:
            groups = unit_groups(model, kind)
            if kind == "hidden":
                check_whole(groups, model, checkpoint)
            if kind == "blocks":
                keep = {group.name: [*range(group.units - 1)] for group in groups}
                type(groups[0]).stock_entries(model, groups, keep, {})
        except PrunekitError:
            continue
        found.append(kind)
    return found


def unit_problem(model: PreTrainedModel, kind: Kind, ids: Tensor) -> str | None:
    """Remove a unit of each group and return how the outputs differ from those with closed gates.

    Args:
        model: A model with weights, which is changed.
        kind: "heads", "neurons" or "hidden".
        ids: Tokens [B, T].
    """
    gates = {"heads": prunekit.heads, "neurons": prunekit.neurons}.get(kind, prunekit.hidden)(model)
    whole = answers(model, ids)
    for index, group in enumerate(gates.groups):
        step = group.unit_multiple(1)
        if group.units > step:
            first = index % group.units // step * step
            gates.gates[group.name].keep[first : first + step] = False
    expected = answers(model, ids)
    if torch.equal(whole, expected):
        return f"{kind}: closed gates change nothing"
    gates.finalize()
    found = answers(model, ids)
    error = float((found - expected).abs().max() / expected.abs().max())
    return f"{kind}: removed and gated outputs differ by {error:.1e}" if error > NEAR else None
