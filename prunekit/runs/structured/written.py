"""Tensors and config of the checkpoint that a structured run writes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from prunekit.checkpoint.header import FLOAT_DTYPES
from prunekit.checkpoint.parts import is_whole, put_parts
from prunekit.models.experts import unfused
from prunekit.models.units.base import Kept, UnitGroup
from prunekit.models.units.block_entries import entries_of_kept
from prunekit.models.units.block_names import tensor_sources
from prunekit.models.units.blocks import BlockGroup
from prunekit.models.units.experts import ExpertGroup
from prunekit.models.units.heads_neurons import LinearUnitGroup
from prunekit.models.units.kinds import NUMBERED
from prunekit.models.units.narrowing import STORED
from prunekit.models.units.replay import unless_equal
from prunekit.runs.block_shards import as_stored
from prunekit.runs.structured.plan import StructuredPlan

WITH_STACK = (LinearUnitGroup, BlockGroup, ExpertGroup)
"""Groups whose units are in the blocks of one stack."""


def rounded_names(plan: StructuredPlan) -> dict[str, str]:
    """Return the name of each tensor that loading rounds.

    It is empty if the config asks for a data type, in which all weights are then written.
    """
    if plan.config.model.dtype != "auto":
        return {}
    return {
        name: stored
        for name, stored in plan.stored.items()
        if _loses(_stored_dtype(plan, stored), plan.dtype)
    }


def rounding_notes(plan: StructuredPlan) -> list[str]:
    """Return a note about tensors that lose precision, if there are any."""
    count = len({*rounded_names(plan).values()})
    if not count:
        return []
    return [
        f"{count} tensors would lose precision in {plan.dtype}, in which the run computes: they "
        "and their parts are written as stored, unless they are refitted or rescaled."
    ]


def remember_stored(plan: StructuredPlan, model: PreTrainedModel) -> None:
    """Attach the stored value to each parameter that rounds it.

    It follows the removal of units, so that only weights that the run changes are written rounded.
    """
    values = model.state_dict(keep_vars=True)
    # The linear of a fused expert is no parameter of the model: it is compared by name.
    rounded = {name: stored for name, stored in rounded_names(plan).items() if name in values}
    tensors = plan.checkpoint.read(set(rounded.values()))
    for name, stored in rounded.items():
        setattr(values[name], STORED, tensors[stored])


@torch.no_grad()
def restore_stored(model: PreTrainedModel, computed: torch.dtype) -> None:
    """Set unchanged parameters to their stored values.

    Args:
        model: The model, in a type wider than before.
        computed: Type in which it was loaded.
    """
    for parameter in model.parameters():
        stored = getattr(parameter, STORED, None)
        if stored is not None:
            parameter.copy_(unchanged(stored, parameter.detach().cpu(), computed))


def written_tensors(plan: StructuredPlan, model: PreTrainedModel, kept: Kept) -> dict[str, Tensor]:
    """Return the tensors of the output checkpoint, by stored name.

    Args:
        plan: The plan of the run.
        model: The model without the removed units.
        kept: Kept units of each group of blocks or experts; empty if none is removed.
    """
    asked = plan.config.model.dtype
    dtype = None if asked == "auto" else getattr(torch, asked)
    sources = tensor_sources(numbered_groups(plan), kept, plan.stored, plan.checkpoint.entries)
    # Of tensors that were computed with in a narrower type, those that did not change are copied.
    copied = {
        source.stored
        for source in sources.values()
        if source.name is None or _loses(_stored_dtype(plan, source.stored), plan.dtype)
    }
    dense, tensors = plan.checkpoint.read(copied), {}
    with unfused(model):
        values = model.state_dict(keep_vars=True)
    for name, source in sources.items():
        if source.name is not None and source.name not in values:
            continue  # of an attention or feed-forward that is removed as a whole
        value = dense.get(source.stored)
        if source.name is not None:
            computed = values[source.name]
            stored = getattr(computed, STORED, value)
            value = unchanged(stored, computed.detach().cpu(), plan.dtype)
        assert value is not None
        written = source.of(value)
        tensors[name] = as_stored(written, dtype or _stored_dtype(plan, source.stored))
    whole = {name: tensor for name, tensor in tensors.items() if is_whole(name)}
    parts = {name: tensor for name, tensor in tensors.items() if name not in whole}
    return put_parts(whole, parts)


def config_changes(
    plan: StructuredPlan, before: Mapping[str, Any], after: Mapping[str, Any], kept: Kept
) -> tuple[dict[str, Any], list[str]]:
    """Return the changed and the removed entries of ``config.json``.

    Args:
        plan: The plan of the run.
        before: Entries of the whole model's config, as transformers reads them.
        after: Entries of the smaller model's config.
        kept: Kept blocks of each list; empty if no block is removed.
    """
    groups = (group for groups in plan.groups.values() for group in groups)
    parts = {group.stack.config for group in groups if isinstance(group, WITH_STACK)}
    changes = _Changes(parts, block_lists(plan), kept)
    changed, dropped = changes.of("", plan.checkpoint.config, plan.model.config, before, after)
    changed.pop("quantization_config", None)
    return changed, dropped


@dataclass(frozen=True)
class _Changes:
    """Finds the changed entries of a config and of its parts.

    Attributes:
        parts: Parts whose entries the units are in, by dotted path.
        lists: The lists of blocks of which some are removed.
        kept: The kept blocks of each.
    """

    parts: Collection[str]
    lists: Sequence[BlockGroup]
    kept: Kept

    def of(
        self,
        path: str,
        stored: Mapping[str, Any],
        config: PreTrainedConfig,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
    ) -> tuple[dict[str, Any], list[str]]:
        """Return the changed and the removed entries of a part."""
        changed: dict[str, Any] = {}
        flat: set[str] = set()
        for key, value in after.items():
            inner = f"{path}.{key}".lstrip(".")
            if before.get(key) == value:
                continue
            changed[key] = value
            own = stored.get(key)
            if any(f"{part}.".startswith(f"{inner}.") for part in self.parts):
                part = own if isinstance(own, Mapping) else before[key]
                new, gone = self.of(inner, part, getattr(config, key), before[key], value)
                both = {**part, **new}
                changed[key] = {name: both[name] for name in both if name not in gone}
                if part is not own:  # its entries are stored one level higher
                    flat |= {*new, *gone} & stored.keys()
        aliases = {alias for alias, name in config.attribute_map.items() if name in changed}
        aliases -= changed.keys()
        # Keys of other versions of transformers, and keys that it ignores, list blocks too.
        for group in self.lists:
            if group.stack.config == path:
                keep = self.kept[group.name]
                listed = entries_of_kept(stored, group.stack, keep, group.units)
                if group.stack.depth in stored:
                    listed[group.stack.depth] = len(keep)
                changed = {k: value for k, value in listed.items() if k not in aliases} | changed
        return changed, sorted(
            before.keys() - after.keys() | aliases & stored.keys() | flat - changed.keys()
        )


def numbered_groups(plan: StructuredPlan) -> list[UnitGroup]:
    """Return the groups whose units are numbered in names."""
    return [group for kind in NUMBERED for group in plan.groups.get(kind, ())]


def block_lists(plan: StructuredPlan) -> list[BlockGroup]:
    """Return the lists of blocks, or none if no block is removed."""
    return [group for group in plan.groups.get("blocks", ()) if isinstance(group, BlockGroup)]


def _stored_dtype(plan: StructuredPlan, stored: str) -> torch.dtype:
    entry = plan.checkpoint.entry(stored)
    assert entry is not None
    return entry.dtype


def _loses(stored: torch.dtype, computed: torch.dtype) -> bool:
    """Return whether values are rounded when they are computed with."""
    return stored in FLOAT_DTYPES and stored != computed and computed.itemsize <= stored.itemsize


def unchanged(stored: Tensor | None, value: Tensor, computed: torch.dtype) -> Tensor:
    """Return the stored tensor if the run did not change it.

    Otherwise, or if there is none, return ``value``.

    Args:
        stored: The tensor as stored, without the removed units.
        value: The tensor as the run leaves it.
        computed: Type to which it was rounded when the model was loaded.
    """
    if stored is None or stored.shape != value.shape:
        return value
    return unless_equal(stored, value, computed)
