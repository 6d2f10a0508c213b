"""Selection of the units to remove.

Counts are exact, and no layer is left without units unless that is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from prunekit.errors import ConfigError

if TYPE_CHECKING:
    from prunekit.models.units.base import UnitGroup

UnitScope = Literal["global", "layer"]
"""Units compared with each other: those of all layers, or those of one layer."""


class RemovedUnit(NamedTuple):
    """A unit to be removed; ``layer`` is an index into the groups."""

    layer: int
    unit: int
    score: float


def select_units(
    scores: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    sparsity: float,
    *,
    scope: UnitScope = "global",
    least: int = 1,
    multiples: Mapping[str, int] | None = None,
) -> list[RemovedUnit]:
    """Return the units with the lowest scores, lowest first.

    Args:
        scores: Score of each unit, by group; higher is kept, of equal ones the lower index.
        keep: False for units that are removed already; they count but are not returned.
        sparsity: Fraction of all units that is removed afterwards, from 0 up to 1. The count is
            rounded to the nearest integer, half up.
        scope: "global" compares units of all layers, "layer" removes the same fraction of each.
        least: Units that every layer keeps, 0 or more.
        multiples: The kept number of a layer is rounded up to a multiple of this, or all are kept.

    Raises:
        ConfigError: The count is impossible, or a score is not a number.
    """
    _check_options(sparsity, scope, least)
    check_covers("scores", scores, keep)
    refuse_nan_scores(scores)
    compared = [[name] for name in keep] if scope == "layer" else [[*keep]]
    layers = {name: layer for layer, name in enumerate(keep)}
    removed: list[RemovedUnit] = []
    for names in compared:
        before = sum(int((~keep[name]).sum()) for name in names)
        count = unit_count(sparsity, sum(len(keep[name]) for name in names)) - before
        removed += _lowest(
            [
                RemovedUnit(layers[name], unit, float(scores[name][unit]))
                for name in names
                for unit in keep[name].nonzero().flatten().tolist()
            ],
            count,
            {layers[name]: int(keep[name].sum()) - least for name in names},
        )
    if removed and len(removed) == sum(int(units.sum()) for units in keep.values()):
        raise ConfigError(
            f"sparsity: {sparsity:g} prunes all {len(removed)} units that are left, and a model "
            "keeps at least one. Ask for less."
        )
    left = {layers[name]: int(units.sum()) for name, units in keep.items()}
    by_layer = {layers[name]: each for name, each in (multiples or {}).items()}
    return _round_up_kept(removed, left, by_layer)


def _check_options(sparsity: float, scope: object, least: int) -> None:
    if not isinstance(sparsity, Real) or not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity: {sparsity!r} is not from 0 up to, but without, 1.")
    if scope not in get_args(UnitScope):
        raise ConfigError(f"scope: {scope!r} is none. Choose: {', '.join(get_args(UnitScope))}.")
    check_whole("least", least, 0)


def fewest_units(groups: Sequence[UnitGroup], least: int) -> int:
    """Return the fewest units that each group keeps.

    Raises:
        ConfigError: ``least`` is no whole number of at least 0, or is 0 for attentions that cannot
            be without heads.
    """
    check_whole("least", least, 0)
    return max(group.fewest(least) for group in groups)


def unit_count(sparsity: float, units: int) -> int:
    """Return how many units a sparsity prunes, rounded half up."""
    return int(sparsity * units + 0.5)


def check_some_pruned(name: str, sparsity: float, units: int, kind: str, pruned: int) -> None:
    """Refuse a sparsity above 0 by which no unit is pruned.

    Args:
        name: Name of the argument or key, for the message.
        sparsity: Fraction of units that is asked for.
        units: Number of units.
        kind: Their kind.
        pruned: Number of units that are pruned.

    Raises:
        ConfigError: There is none, as numbers of units are rounded.
    """
    if sparsity and not pruned:
        raise ConfigError(
            f"{name}: of {units} {kind} {sparsity:g} prunes none. Less than half a unit, of each "
            "layer with that scope, is none, and the kept ones are rounded up to what round_to and "
            "transformers ask for. Ask for more."
        )


def check_whole(name: str, number: object, lowest: int = 1) -> None:
    """Refuse an argument that is no whole number of at least ``lowest``.

    Raises:
        ConfigError: Names the argument.
    """
    if not isinstance(number, Integral) or isinstance(number, bool) or number < lowest:
        raise ConfigError(f"{name}: {number!r} is not a whole number of at least {lowest}.")


def check_covers(
    argument: str,
    found: object,
    groups: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Refuse an argument without one value for each unit.

    Args:
        argument: Its name, for the message.
        found: Its value: a mapping of group names to tensors.
        groups: Masks of the units, or gates with such a mask, by group name.
        dtype: Required type of the tensors; None for any.

    Raises:
        ConfigError: Names the first group without a fitting tensor.
    """
    for name, group in groups.items():
        units = len(group if isinstance(group, Tensor) else group.keep)
        each = found.get(name) if isinstance(found, Mapping) else None
        fits = (
            isinstance(each, Tensor)
            and each.shape == (units,)
            and each.dtype == (dtype or each.dtype)
        )
        if not fits:
            kind = (
                "a tensor" if dtype is None else f"a tensor of {str(dtype).removeprefix('torch.')}"
            )
            raise ConfigError(
                f"{argument}: {name} needs {kind} with {units} values, one for each unit."
            )


def check_finite(name: str, values: Tensor) -> None:
    """Refuse values that are NaN or infinite.

    Raises:
        ConfigError: Names the first such unit.
    """
    if not (finite := values.isfinite()).all():
        unit = int((~finite).nonzero()[0, -1])
        raise ConfigError(f"{name} of unit {unit} is not a finite number.")


def refuse_nan_scores(scores: Mapping[str, Tensor]) -> None:
    """Refuse scores that are not numbers.

    Raises:
        ConfigError: Names the first such unit.
    """
    for name, score in scores.items():
        if score.isnan().any():
            unit = int(score.isnan().nonzero()[0])
            raise ConfigError(f"{name}: the score of unit {unit} is not a number.")


def _round_up_kept(
    removed: list[RemovedUnit], left: Mapping[int, int], multiples: Mapping[int, int]
) -> list[RemovedUnit]:
    """Drop units from the removed ones until each layer keeps a multiple.

    Of each layer the removed units with the highest scores are kept after all.
    """
    removed_of_layer = Counter(unit.layer for unit in removed)
    spared = {
        layer: min(count, -(left[layer] - count) % multiples.get(layer, 1))
        for layer, count in removed_of_layer.items()
    }
    chosen = []
    for unit in reversed(removed):
        if spared[unit.layer] > 0:
            spared[unit.layer] -= 1
        else:
            chosen.append(unit)
    return chosen[::-1]


def _lowest(
    candidates: list[RemovedUnit], count: int, removable: dict[int, int]
) -> list[RemovedUnit]:
    """Return ``count`` candidates, at most the removable number of each layer."""
    if count < 0:
        raise ConfigError(
            f"sparsity: {-count} units more than that are pruned already. Reactivate some, or ask "
            "for more."
        )
    if count > (most := sum(max(left, 0) for left in removable.values())):
        raise ConfigError(
            f"sparsity: {count} units should go, but with those that each layer keeps only {most} "
            "can. Ask for less, or lower `least`."
        )
    chosen: list[RemovedUnit] = []
    for unit in sorted(candidates, key=lambda unit: (unit.score, -unit.layer, -unit.unit)):
        if len(chosen) == count:
            break
        if removable[unit.layer] > 0:
            removable[unit.layer] -= 1
            chosen.append(unit)
    assert len(chosen) == count
    return chosen
