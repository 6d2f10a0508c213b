"""How a model config states the heads and neurons of its blocks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from prunekit.architectures import Attention
from prunekit.errors import ShapeError
from prunekit.models.units.meta_model import format_entries
from prunekit.models.units.position_bias import bias_columns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunekit.architectures.base import Count
    from prunekit.models.units.base import Kept
    from prunekit.models.units.heads_neurons import LinearUnitGroup


def by_entry(groups: Sequence[LinearUnitGroup]) -> list[list[LinearUnitGroup]]:
    """Return groups of a kind together whose number one config entry states."""
    found: dict[str, list[LinearUnitGroup]] = {}
    for group in groups:
        entry = "" if isinstance(group.declared, Attention) else group.declared.entry
        found.setdefault(group.stack.entry(entry), []).append(group)
    return [*found.values()]


def common_count(groups: Sequence[LinearUnitGroup], kept: Kept, family: str) -> int:
    """Return the number of units that every group keeps.

    Args:
        groups: Groups of one entry.
        kept: Kept units of each group.
        family: Model type, for the message.

    Raises:
        ShapeError: The numbers differ.
    """
    counts = {len(kept[group.name]) for group in groups}
    if len(counts) > 1:
        raise ShapeError(
            f"{groups[0].kind}: blocks keep from {min(counts)} to {max(counts)}, and a config of "
            f'type {family!r} has one number for all. Choose scope = "layer", or uniform = true in '
            "a config."
        )
    return counts.pop()


def check_none_empty(empty: Sequence[str], kind: str, family: str) -> None:
    """Refuse a model of which attentions or feed-forwards have no units.

    Args:
        empty: Their names.
        kind: Kind of the units.
        family: Model type, for the message.

    Raises:
        ShapeError: There are some.
    """
    if empty:
        raise ShapeError(
            f"{empty[0]}: all of its {kind} are removed, and a config of type {family!r} has one "
            "number for all."
        )


def check_same_bias_heads(groups: Sequence[LinearUnitGroup], kept: Kept, family: str) -> None:
    """Refuse different heads in blocks that share a position bias.

    Args:
        groups: All groups of a kind.
        kept: Kept units of each group.
        family: Model type, for the message.

    Raises:
        ShapeError: The kept heads of two blocks of a stack differ.
    """
    for stack in {group.stack.blocks for group in groups}:
        columns = {
            tuple(bias_columns(group.module, kept[group.name]))
            for group in groups
            if group.has_bias_columns and group.stack.blocks == stack
        }
        if len(columns) > 1:
            raise ShapeError(
                f"heads: blocks of a stack of type {family!r} share one position bias with a "
                "column a head, so a stock model keeps the same heads in each; these differ."
            )


def config_entries(group: LinearUnitGroup, units: int, family: str) -> dict[str, int]:
    """Return the config entries for a number of units per group.

    Args:
        group: One of the groups.
        units: Number of units.
        family: Model type, for the message.

    Raises:
        ShapeError: A config of this family has no entry for the number of heads alone.
    """
    if not isinstance(group.declared, Attention):
        if not group.declared.entry:
            raise ShapeError(f"neurons: no entry of a config of type {family!r} is their number.")
        return {group.stack.entry(group.declared.entry): units}
    if not group.declared.entries:
        raise ShapeError(
            f"heads: in a config of type {family!r} the size of a head is the hidden size divided "
            "by the number of heads, so that it cannot say fewer heads of the same size."
        )
    counts = head_counts(group, units)
    return {group.stack.entry(name): counts[count] for name, count in group.declared.entries}


def check_same_shape(
    groups: Sequence[LinearUnitGroup],
    stock: Sequence[LinearUnitGroup],
    kept: Kept,
    entries: Mapping[str, Any],
) -> None:
    """Check that a stock model has the shapes of the pruned one.

    Args:
        groups: Groups before the removal.
        stock: The same groups in the stock model.
        kept: Kept units of each group.
        entries: The changed config entries, for the message.

    Raises:
        ShapeError: Names the first group of another shape.
    """
    for group, other in zip(groups, stock, strict=True):
        size, units = group.features_per_unit, len(kept[group.name])
        if (other.units, other.features_per_unit) != (units, size):
            raise ShapeError(
                f"{group.name}: a config with {format_entries(entries)} makes {other.units} "
                f"{group.kind} of {other.features_per_unit} features, not {units} of {size}."
            )


def check_same_rest(
    usual: PreTrainedModel,
    fewer: PreTrainedModel,
    groups: Sequence[LinearUnitGroup],
    entries: Mapping[str, Any],
) -> None:
    """Check that config entries change nothing but the units.

    Args:
        usual: Stock model with all units.
        fewer: Stock model with the kept ones.
        groups: All groups of a kind.
        entries: The changed config entries, for the message.

    Raises:
        ShapeError: Names the first other parameter that changes.
    """
    inside = tuple(f"{name}." for group in groups for name in _modules(group))
    after = {name: parameter.shape for name, parameter in fewer.named_parameters()}
    for name, parameter in usual.named_parameters():
        if not name.startswith(inside) and parameter.shape != after.get(name):
            raise ShapeError(
                f"{groups[0].kind}: a config with {format_entries(entries)} also changes {name}, "
                f"from {list(parameter.shape)} to {list(after.get(name, ()))}."
            )


def _modules(group: LinearUnitGroup) -> list[str]:
    """Return the full names of the modules that a group is in."""
    declared = group.declared
    if isinstance(declared, Attention):
        block = group.name.removesuffix(declared.module)
        paths = (declared.query, declared.key, declared.value, declared.output)
        return [group.name, *(f"{block}{path}" for path in paths)]
    block = group.name.removesuffix(declared.output)
    return [f"{block}{path}" for path in (*declared.inputs, declared.output)]


def head_counts(group: LinearUnitGroup, units: int) -> dict[Count, int]:
    """Return the sizes of an attention with a number of units."""
    declared = cast("Attention", group.declared)
    size = cast("int", getattr(group.module, declared.size))
    heads = units * group.features_per_unit // size
    return {"heads": heads, "groups": units, "size": size, "width": heads * size}


def set_head_counts(group: LinearUnitGroup, declared: Attention, units: int) -> None:
    """Set the attributes in which an attention states its number of heads.

    Args:
        group: Group of the heads, as it was before the removal.
        declared: Declaration of the attention.
        units: Number of units that are left.
    """
    counts = head_counts(group, units)
    module: Any = group.module
    for name, count in declared.counts:
        if name.startswith("config."):
            # Copied, since other attentions share the config object.
            module.config = copy.copy(module.config)
            setattr(module.config, name.removeprefix("config."), counts[count])
        else:
            setattr(module, name, counts[count])
