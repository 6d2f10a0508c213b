"""Final removal of pruned units: refit, fold factors, cut matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from prunekit.errors import ConfigError, ShapeError
from prunekit.models.orientation import weight_matrix
from prunekit.models.units.heads_neurons import LinearUnitGroup
from prunekit.models.units.kinds import WHOLE
from prunekit.models.units.removal import apply_removal, count_parameters
from prunekit.models.units.stock_config import check_uniform_record, stock_entries
from prunekit.structured.batches import Data, eval_mode, to_batches
from prunekit.structured.gated_model import GatedModel
from prunekit.structured.refit import reader_grams, refit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunekit.models.units.base import UnitGroup
    from prunekit.structured.gate import Gate

STOCK = "A stock Hugging Face model: save_pretrained writes a folder that any tool opens."
OWN = (
    "save_pretrained writes a folder that prunekit.load opens, and from_pretrained after `import "
    "prunekit`; without prunekit it is refused, with an error about mismatched sizes."
)


@dataclass(frozen=True)
class Finalized:
    """The result of finalizing a model.

    Attributes:
        kept: Kept units of each group.
        parameters: Number of parameters before and after.
        stock: Whether the config describes the shapes, so that any tool opens a saved folder.
        note: The same as a text; with the reason if the config does not.
    """

    kept: dict[str, list[int]]
    parameters: tuple[int, int]
    stock: bool
    note: str


def finalize(
    model: PreTrainedModel,
    groups: Sequence[UnitGroup],
    gates: Mapping[str, Gate],
    data: Data | None = None,
    *,
    stock: bool = False,
) -> Finalized:
    """Remove pruned units and all gates from a model, in place.

    Args:
        model: The model with its gates.
        groups: All groups of one kind; invalid afterwards.
        gates: The gate of each group, by group name.
        data: Refits the reading linears on these samples; see :meth:`Gates.finalize`.
        stock: Refuse, before any change, if a stock config cannot describe the new shapes.

    Raises:
        ConfigError: See :func:`check_foldable`.
        ShapeError: A config has to describe the new shapes and cannot.
        CheckpointError: See :meth:`prunekit.models.units.base.UnitGroup.check_unequal`.
    """
    kept = kept_units(gates)
    check_foldable(groups, gates, data)
    entries, note = None, STOCK
    try:
        entries = stock_entries(model, groups, kept)
        check_uniform_record(model, kept)
    except ShapeError as error:
        if stock or (entries is None and groups[0].kind in WHOLE):
            raise
        if entries is None:
            for group in groups:
                group.check_unequal()
        note = f"{error} {OWN}"
    before = count_parameters(model)
    if data is not None:
        _refit_in_order(
            GatedModel(model, linear_groups_of(groups), gates, to_batches(data, model)), kept
        )
    _fold(linear_groups_of(groups), gates)
    for gate in gates.values():
        gate.detach()
    apply_removal(model, groups, kept, entries)
    return Finalized(kept, (before, count_parameters(model)), note == STOCK, note)


def kept_units(gates: Mapping[str, Gate]) -> dict[str, list[int]]:
    """Return the unpruned units of each group, in ascending order."""
    return {name: gate.keep.cpu().nonzero().flatten().tolist() for name, gate in gates.items()}


def linear_groups_of(groups: Sequence[UnitGroup]) -> list[LinearUnitGroup]:
    """Return the groups of heads and neurons, whose units one linear reads."""
    return [group for group in groups if isinstance(group, LinearUnitGroup)]


def check_foldable(
    groups: Sequence[UnitGroup], gates: Mapping[str, Gate], data: Data | None
) -> None:
    """Refuse a refit or half-open gates where no linear absorbs them.

    Args:
        groups: All groups of one kind.
        gates: The gate of each group, by group name.
        data: Samples for a refit, if any.

    Raises:
        ConfigError: There is data for blocks or coordinates, or one of their gates is neither open
            nor closed.
    """
    kind = groups[0].kind
    if kind not in WHOLE:
        return
    if data is not None:
        raise ConfigError(f"data: no linear that could be refitted reads {kind}.")
    for name, gate in gates.items():
        partial = gate.keep & (gate.value != 1)
        if bool(partial.any()):
            raise ConfigError(
                f"{name}: the gate of unit {int(partial.nonzero()[0])} is neither 0 nor 1, and no "
                f"weight can stand for a factor of {kind}. Prune it, or set it to 1."
            )


def _refit_in_order(gated: GatedModel, kept: Mapping[str, Sequence[int]]) -> None:
    """Refit the reader of each pruned group, in run order."""
    with eval_mode(gated.model):
        for group in gated.groups:
            if len(kept[group.name]) < group.units:
                single = GatedModel(gated.model, [group], gated.gates, gated.batches)
                total = reader_grams(single, after_gates=False)[group.name]
                refit(group, total, kept[group.name])


@torch.no_grad()
def _fold(groups: Sequence[LinearUnitGroup], gates: Mapping[str, Gate]) -> None:
    """Multiply the weights that read kept units by their factors."""
    for group in groups:
        gate = gates[group.name]
        if bool((gate.value[gate.keep] != 1).any()):
            weight = weight_matrix(group.reader.linear)
            weight *= gate.value.to(weight)[group.owner.to(weight.device)]
