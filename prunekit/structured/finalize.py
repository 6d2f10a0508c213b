"""Final removal of pruned units: refit, fold factors, cut matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from prunekit.errors import ConfigError, ShapeError
from prunekit.models.orientation import weight_matrix
from prunekit.models.units.find import check_current, unit_groups
from prunekit.models.units.heads_neurons import LinearUnitGroup
from prunekit.models.units.kinds import WHOLE, Kind
from prunekit.models.units.narrowing import Narrowing, narrow_linear, recorded_steps
from prunekit.models.units.removal import apply_removal, count_parameters
from prunekit.models.units.stock_config import check_uniform_record, stock_entries
from prunekit.structured.batches import Data, eval_mode, to_batches
from prunekit.structured.gated_model import GatedModel
from prunekit.structured.optimizers import replace_parameters
from prunekit.structured.refit import reader_grams, refit

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from prunekit.models.units.base import Kept, UnitGroup
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
    optimizers: Sequence[Optimizer] = (),
) -> Finalized:
    """Remove pruned units and all gates from a model, in place.

    Parameters are replaced, none is changed: the old ones are as they were.

    Args:
        model: The model with its gates.
        groups: All groups of one kind; invalid afterwards.
        gates: The gate of each group, by group name.
        data: Refits the reading linears on these samples; see :meth:`Gates.finalize`.
        stock: Refuse, before any change, if a stock config cannot describe the new shapes.
        optimizers: Those that train the model, and then the smaller one.

    Raises:
        ConfigError: No unit is kept, or none of a layer that cannot be without; see also
            :func:`check_foldable` and :func:`check_current`.
        ShapeError: A config has to describe the new shapes and cannot.
        CheckpointError: See :meth:`prunekit.models.units.base.UnitGroup.check_unequal`.
    """
    check_current(model, groups)
    kept = kept_units(gates)
    check_foldable(groups, gates, data)
    entries, note = describe(model, groups, kept, stock=stock)
    before, parameters = count_parameters(model), {*model.parameters()}
    with recorded_steps() as steps:
        if data is not None:
            _refit_in_order(
                GatedModel(model, linear_groups_of(groups), gates, to_batches(data, model)), kept
            )
        for gate in gates.values():
            gate.detach()
        apply_removal(model, groups, kept, entries)
        _fold(model, groups[0].kind, gates)
    narrowings = [step for step in steps if isinstance(step, Narrowing)]
    after = {*model.parameters()}
    assert after - parameters <= {step.after for step in narrowings}
    removed = parameters - after - {step.before for step in narrowings}
    removed |= {gate.value for gate in gates.values()}
    for optimizer in optimizers:
        replace_parameters(optimizer, narrowings, removed)
    return Finalized(kept, (before, count_parameters(model)), note == STOCK, note)


def describe(
    model: PreTrainedModel, groups: Sequence[UnitGroup], kept: Kept, *, stock: bool
) -> tuple[dict[str, Any] | None, str]:
    """Return the config entries of the smaller model, and a note.

    Args:
        model: The model.
        groups: All groups of one kind.
        kept: Kept units of each group.
        stock: Refuse if a stock config cannot describe the new shapes.

    Raises:
        ConfigError: No unit is kept, or none of a layer that cannot be without.
        ShapeError: A config has to describe the new shapes and cannot.
        CheckpointError: See :meth:`prunekit.models.units.base.UnitGroup.check_unequal`.
    """
    for group in groups:
        is_empty = not kept[group.name]
        if is_empty and (group.fewest(0) or not any(kept.values())):
            raise ConfigError(
                f"{group.name}: all of its {group.units} {group.kind} are pruned, and at least one "
                f"of the {group.kind} is kept. Reactivate one."
            )
    entries = None
    try:
        entries = stock_entries(model, groups, kept)
        check_uniform_record(model, kept)
    except ShapeError as error:
        if stock or (entries is None and groups[0].kind in WHOLE):
            raise
        if entries is None:
            for group in groups:
                group.check_unequal()
        return entries, f"{error} {OWN}"
    return entries, STOCK


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
            if 0 < len(kept[group.name]) < group.units:
                single = GatedModel(gated.model, [group], gated.gates, gated.batches)
                total = reader_grams(single, after_gates=False)[group.name]
                linear = group.reader.linear
                everything = torch.arange(weight_matrix(linear).shape[1])
                narrow_linear(linear, everything, outputs=False)  # the refit changes a copy
                refit(group, total, kept[group.name])


@torch.no_grad()
def _fold(model: PreTrainedModel, kind: Kind, gates: Mapping[str, Gate]) -> None:
    """Multiply the weights of the kept units by their factors."""
    factors = {name: gate.value.detach()[gate.keep] for name, gate in gates.items()}
    if all(bool((factor == 1).all()) for factor in factors.values()):
        return
    for group in linear_groups_of(unit_groups(model, kind)):
        group.scale(factors[group.name])
