"""What a stock ``config.json`` can say of a model whose heads or neurons are fewer."""

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from prunekit.architectures import Attention
from prunekit.errors import ShapeError
from prunekit.removal import RECORD, Kept, biased, original
from prunekit.sites import Site, counts, sites


def stock_entries(model: PreTrainedModel, found: Sequence[Site], kept: Kept) -> dict[str, int]:
    """Return what ``config.json`` has to say of a model whose sites keep these units.

    Raises:
        ShapeError: A stock config cannot say it; the message names the constraint.
    """
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
    _try(model, found, kept, entries)
    return entries


def refuse_recorded(model: PreTrainedModel, kept: Kept) -> None:
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
    model: PreTrainedModel, found: Sequence[Site], kept: Kept, entries: Mapping[str, int]
) -> None:
    """Build the stock model that the entries describe, without weights, and compare its shapes.

    Raises:
        ShapeError: transformers refuses the config, or it describes another shape.
    """
    said: dict[str, Any] = {**model.config.to_dict(), **entries}
    for ours in (RECORD, "quantization_config"):
        said.pop(ours, None)
    shown = ", ".join(f"{name} = {value}" for name, value in entries.items())
    try:
        config = type(model.config).from_dict(said)
        with init_empty_weights(include_buffers=True):
            trial = type(model)._from_config(config)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ShapeError(
            f"{found[0].kind}: transformers refuses a config with {shown}: {reason}"
        ) from error
    for site, other in zip(found, sites(trial, found[0].kind), strict=True):
        if (other.units, other.span) != (len(kept[site.name]), site.span):
            raise ShapeError(
                f"{site.name}: a config with {shown} makes {other.units} {site.kind} of "
                f"{other.span} features, not {len(kept[site.name])} of {site.span}."
            )
