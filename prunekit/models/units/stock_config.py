"""Which numbers of units a stock ``config.json`` can describe."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from prunekit.errors import ShapeError
from prunekit.models.units.base import Kept, UnitGroup
from prunekit.models.units.kept_record import read_record


def stock_entries(
    model: PreTrainedModel,
    groups: Sequence[UnitGroup],
    kept: Kept,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the config entries of a model with only the kept units.

    Args:
        model: The model as it is now, with or without weights.
        groups: All groups of one kind.
        kept: Kept units of each group.
        given: Entries that already changed because of kinds removed before.

    Raises:
        ShapeError: A stock config cannot describe it; the message names the constraint.
    """
    return type(groups[0]).stock_entries(model, groups, kept, given or {})


def expressible_in_config(
    model: PreTrainedModel, groups: Sequence[UnitGroup]
) -> Callable[[Mapping[str, int]], bool]:
    """Return a predicate: can a stock config describe these numbers of units?

    The predicate takes the number of kept units by group name and caches its results.

    Args:
        model: The model, with or without weights.
        groups: Groups of any kinds, in the order of their removal.
    """
    by_kind = {group.kind: [each for each in groups if each.kind == group.kind] for group in groups}
    known: dict[tuple[int, ...], bool] = {}

    def expressible(numbers: Mapping[str, int]) -> bool:
        key = tuple(numbers[group.name] for group in groups)
        if key not in known:
            known[key] = _expressible(model, by_kind, numbers)
        return known[key]

    return expressible


def fixed_blocks(model: PreTrainedModel, groups: Sequence[UnitGroup]) -> dict[str, list[int]]:
    """Return the first or last blocks that no stock config can omit.

    Keys are names of the lists. The blocks to remove are known only once all are ranked. If a
    config can omit the first block, or else the second, any kind of block may be at every later
    place; the same holds from the end.

    Args:
        model: The model as it is now, with or without weights.
        groups: The lists of its blocks.

    Raises:
        ShapeError: A stock config ties the kind of a block to its place.
    """
    fixed: dict[str, list[int]] = {}
    for group in groups:
        last = group.units - 1
        for end, next_one in ((0, 1), (last, last - 1)):
            try:
                _without_block(model, groups, group, end)
            except ShapeError:
                if group.units < 3:
                    raise
                _without_block(model, groups, group, next_one)
                fixed.setdefault(group.name, []).append(end)
    return fixed


def _without_block(
    model: PreTrainedModel, groups: Sequence[UnitGroup], group: UnitGroup, unit: int
) -> None:
    """Refuse a model without one block if no stock config describes it."""
    kept = {each.name: [*range(each.units)] for each in groups}
    kept[group.name].remove(unit)
    stock_entries(model, groups, kept)


def check_uniform_record(model: PreTrainedModel, kept: Kept) -> None:
    """Refuse a model with unequal groups from an earlier removal.

    No stock config describes their shapes.

    Args:
        model: The model.
        kept: Kept units of the groups that are removed from now; these are not considered.

    Raises:
        ShapeError: Names the first such group.
    """
    unequal = [name for name in read_record(model) if name not in kept]
    if unequal:
        raise ShapeError(
            f"{unequal[0]}: it and {len(unequal) - 1} others were left with units that a config of "
            f"type {model.config.model_type!r} cannot say."
        )


def _expressible(
    model: PreTrainedModel, by_kind: Mapping[str, Sequence[UnitGroup]], numbers: Mapping[str, int]
) -> bool:
    entries: dict[str, Any] = {}
    try:
        for kind, groups in by_kind.items():
            kept = {group.name: range(numbers[group.name]) for group in groups}
            new = stock_entries(model, groups, kept, entries)
            if kind != "blocks":  # which blocks are kept, and so their entries, is not known yet
                entries |= new
    except ShapeError:
        return False
    return True
