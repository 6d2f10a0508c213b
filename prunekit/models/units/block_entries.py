"""Config entries that list the blocks of a stack, after a removal."""

from collections.abc import Mapping, Sequence
from typing import Any

from prunekit.architectures import Stack


def entries_of_kept(
    config: Mapping[str, Any], stack: Stack, keep: Sequence[int], units: int
) -> dict[str, Any]:
    """Return the config entries that list blocks, for the kept ones.

    Only entries that the config has are returned, so that both the keys of a ``config.json`` and
    those that transformers derives from them can be given.

    Args:
        config: Entries of a config.
        stack: The stack of the blocks.
        keep: Numbers of the kept blocks, in their new order.
        units: Number of blocks that the stack has.
    """
    entries: dict[str, Any] = {}
    for name in stack.per_block:
        values = config.get(name)
        if isinstance(values, str | list | tuple) and len(values) >= units:
            # Values beyond the last block are those of blocks for multi-token prediction.
            kept = [*(values[unit] for unit in keep), *values[units:]]
            entries[name] = "".join(kept) if isinstance(values, str) else kept
    for name in stack.block_numbers:
        values = config.get(name)
        if isinstance(values, list | tuple) and all(type(unit) is int for unit in values):
            moved = (new_number(unit, keep, units) for unit in values)
            entries[name] = [unit for unit in moved if unit is not None]
    for name in stack.by_block:
        values = config.get(name)
        if isinstance(values, Mapping) and all(str(unit).isdecimal() for unit in values):
            moved_keys = {unit: new_number(int(unit), keep, units) for unit in values}
            entries[name] = {
                type(unit)(new): values[unit] for unit, new in moved_keys.items() if new is not None
            }
    return entries


def new_number(unit: int, keep: Sequence[int], units: int) -> int | None:
    """Return the new number of a block, or None if removed.

    Blocks beyond the last one of the stack, which a model for multi-token prediction has in its
    files, follow the kept ones.

    Args:
        unit: Number of the block.
        keep: Numbers of the kept blocks, in their new order.
        units: Number of blocks that the stack has.
    """
    if unit >= units:
        return unit - units + len(keep)
    return keep.index(unit) if unit in keep else None
