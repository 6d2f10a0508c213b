"""What a stock ``config.json`` can say of a model whose units are fewer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedModel

from prunekit.architectures import Attention
from prunekit.errors import CheckpointError, ShapeError
from prunekit.models.units.base import UnitGroup
from prunekit.models.units.blocks import Depth, depth_entries
from prunekit.models.units.heads_neurons import Site, counts, sites
from prunekit.models.units.hidden import Width, width_entries
from prunekit.models.units.meta_model import meta_model, shown
from prunekit.models.units.removal import RECORD, Kept, biased, original


def stock_entries(
    model: PreTrainedModel,
    found: Sequence[UnitGroup],
    kept: Kept,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what ``config.json`` has to say of a model whose places keep these units.

    ``given``: what it says by then of kinds that go before.

    Raises:
        ShapeError: A stock config cannot say it; the message names the constraint.
    """
    first = found[0]
    if isinstance(first, Width):
        return width_entries(model, first, kept[first.name], given or {})
    if isinstance(first, Depth):
        return depth_entries(model, cast("Sequence[Depth]", found), kept)
    return _site_entries(model, cast("Sequence[Site]", found), kept, given or {})


def _site_entries(
    model: PreTrainedModel, found: Sequence[Site], kept: Kept, given: Mapping[str, Any]
) -> dict[str, int]:
    sizes = {len(kept[site.name]) for site in found}
    kind, family = found[0].kind, model.config.model_type
    if len(sizes) > 1:
        raise ShapeError(
            f"{kind}: blocks keep from {min(sizes)} to {max(sizes)}, and a config of type "
            f'{family!r} has one number for all. Choose scope = "layer".'
        )
    for stack in {site.stack.blocks for site in found}:
        sharing = [site for site in found if biased(site) and site.stack.blocks == stack]
        if len({tuple(original(site, kept[site.name])) for site in sharing}) > 1:
            raise ShapeError(
                f"heads: blocks of a stack of type {family!r} share one position bias with a "
                "column a head, so a stock model keeps the same heads in each; these differ."
            )
    entries = _entries(found[0], sizes.pop(), family)
    _try(model, found, kept, {**given, **entries})
    return entries


def expressible_in_config(
    model: PreTrainedModel, found: Sequence[UnitGroup]
) -> Callable[[Mapping[str, int]], bool]:
    """Return what says of numbers of units, by place, whether a stock config can say them.

    ``found``: the places that matter, of any kinds, in the order in which they are taken out.
    """
    kinds = {place.kind: [other for other in found if other.kind == place.kind] for place in found}
    known: dict[tuple[int, ...], bool] = {}

    def say(numbers: Mapping[str, int]) -> bool:
        key = tuple(numbers[place.name] for place in found)
        if key not in known:
            known[key] = _sayable(model, kinds, numbers)
        return known[key]

    return say


def _sayable(
    model: PreTrainedModel, kinds: Mapping[str, Sequence[UnitGroup]], numbers: Mapping[str, int]
) -> bool:
    entries: dict[str, Any] = {}
    try:
        for kind, found in kinds.items():
            kept = {place.name: range(numbers[place.name]) for place in found}
            said = stock_entries(model, found, kept, entries)
            if kind != "blocks":  # of which those that stay are not known yet
                entries |= said
    except ShapeError:
        return False
    return True


def check_uniform_record(model: PreTrainedModel, kept: Kept) -> None:
    """Refuse a model of which other sites than these differ from what a stock config can say.

    Raises:
        ShapeError: Names the first of them.
    """
    others = [name for name in getattr(model.config, RECORD, {}) if name not in kept]
    if others:
        raise ShapeError(
            f"{others[0]}: it and {len(others) - 1} others were left with units that a config of "
            f"type {model.config.model_type!r} cannot say."
        )


def _entries(site: Site, units: int, family: str) -> dict[str, int]:
    if not isinstance(site.declared, Attention):
        return {site.declared.entry: units}
    if not site.declared.entries:
        raise ShapeError(
            f"heads: in a config of type {family!r} the size of a head is the hidden size divided "
            "by the number of heads, so that it cannot say fewer heads of the same size."
        )
    said = counts(site, units)
    return {name: said[count] for name, count in site.declared.entries}


def _try(
    model: PreTrainedModel, found: Sequence[Site], kept: Kept, entries: Mapping[str, Any]
) -> None:
    """Build the stock model that the entries describe, without weights, and compare its shapes.

    Raises:
        ShapeError: transformers refuses the config, or it describes another shape.
    """
    kind, family = found[0].kind, model.config.model_type
    try:
        others = sites(meta_model(model, entries, kind), kind)
    except CheckpointError as error:  # of a family that is probed, which has to run for it
        raise ShapeError(
            f"{kind}: a model of type {family!r} with {shown(entries)} does not run."
        ) from error
    for site, other in zip(found, others, strict=True):
        if (other.units, other.span) != (len(kept[site.name]), site.span):
            raise ShapeError(
                f"{site.name}: a config with {shown(entries)} makes {other.units} {kind} of "
                f"{other.span} features, not {len(kept[site.name])} of {site.span}."
            )
