"""Takes heads and neurons out of a model for good: fewer rows and columns, the same answers.

Where all blocks keep equally many, the config can say so and the model is a stock one. Where they
do not, the config says which units are left (``RECORD``), and ``prunekit.load`` opens the folder.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunekit.architectures import Attention
from prunekit.errors import ShapeError
from prunekit.probes.attention import configs, implement, refuse_unseen
from prunekit.sites import Site, counts, matrix, sites

RECORD = "prunekit_kept"
"""Entry of a config: how many units each site has left, where the config says more; of heads with
a position bias, which."""

Kept = Mapping[str, Sequence[int]]
"""The units that each site keeps, by the site's name, in ascending order."""


def remove(site: Site, keep: Sequence[int]) -> None:
    """Take the other units of a site out of the model's matrices, in place.

    ``site`` speaks of the model as it was, so it is of no use afterwards.
    """
    gone = torch.ones(site.units, dtype=torch.bool)
    gone[list(keep)] = False
    for linear in {part.linear: None for part in site.writers}:
        rows = torch.ones(len(matrix(linear)), dtype=torch.bool)
        for part in site.writers:
            if part.linear is linear:
                rows[part.index[gone].flatten()] = False
        _narrow(linear, rows.nonzero().flatten(), outputs=True)
    _narrow(site.reader.linear, site.reader.index[~gone].flatten(), outputs=False)
    if isinstance(site.declared, Attention):
        _tell(site, site.declared, len(keep))
        if site.declared.bias is not None:
            # Of zeros, those for one head do for all.
            _choose_bias(site.module, keep if site.declared.bias else [0])


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
        sharing = [site for site in found if _biased(site) and site.stack.blocks == stack]
        if len({tuple(_original(site, kept[site.name])) for site in sharing}) > 1:
            raise ShapeError(
                f"heads: blocks of a stack of type {family!r} share one position bias with a "
                "column a head, so a stock model keeps the same heads in each; these differ."
            )
    entries = _entries(found[0], sizes.pop(), family)
    _try(model, found, kept, entries)
    return entries


def refuse_unequal(found: Sequence[Site]) -> None:
    """Refuse blocks of different heads where they share a bias and none can choose from it.

    Raises:
        CheckpointError: This transformers computes their attention by itself.
    """
    refuse_unseen(site.module for site in found if _adds(site))


def settle(
    model: PreTrainedModel, found: Sequence[Site], kept: Kept, entries: Mapping[str, int] | None
) -> None:
    """Remove all but the kept units and let the config say what is left.

    Args:
        model: Changed in place.
        found: All sites of one kind, as they are now.
        kept: Their units that stay.
        entries: What :func:`stock_entries` returned; None records the units instead.
    """
    record: dict[str, int | list[int]] = {
        site.name: _original(site, kept[site.name]) if _biased(site) else len(kept[site.name])
        for site in found
    }
    said: dict[str, Any] = getattr(model.config, RECORD, {})
    others = {name: units for name, units in said.items() if name not in kept}
    for site in found:
        remove(site, kept[site.name])
    if entries is None:
        _keep_biases(model, found)
    else:
        record = {}
        _narrow_biases(found)
        for config in configs(model):
            for name, value in entries.items():
                setattr(config, name, value)
    if others or record:
        setattr(model.config, RECORD, {**others, **record})
    elif said:
        delattr(model.config, RECORD)


def restore(model: PreTrainedModel) -> None:
    """Give a model that was built from a config with a record the shapes that it speaks of."""
    record: dict[str, int | list[int]] = getattr(model.config, RECORD, {})
    if not record:
        return
    for found in (sites(model, "heads"), sites(model, "neurons")):
        for site in found:
            left = record.get(site.name, site.units)
            remove(site, range(left) if isinstance(left, int) else left)
        _keep_biases(model, found)


def _narrow(linear: Any, keep: Int[Tensor, " K"], *, outputs: bool) -> None:  # noqa: ANN401
    """Keep some outputs or inputs of an ``nn.Linear`` or a ``Conv1D``."""
    axis = int(outputs == isinstance(linear, Conv1D))
    linear.weight = _selected(linear.weight, axis, keep)
    if outputs and linear.bias is not None:
        linear.bias = _selected(linear.bias, 0, keep)
    if isinstance(linear, Conv1D):
        linear.nx, linear.nf = linear.weight.shape
    else:
        linear.out_features, linear.in_features = linear.weight.shape


def _selected(parameter: nn.Parameter, axis: int, keep: Int[Tensor, " K"]) -> nn.Parameter:
    chosen = parameter.detach().index_select(axis, keep.to(parameter.device))
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)


def _tell(site: Site, declared: Attention, units: int) -> None:
    """Set what the attention itself says of its heads."""
    said = counts(site, units)
    for name, count in declared.counts:
        if name.startswith("config."):
            # A copy, since the others read theirs.
            site.module.config = copy.copy(site.module.config)
            setattr(site.module.config, name.removeprefix("config."), said[count])
        else:
            setattr(site.module, name, said[count])


def _choose_bias(module: nn.Module, keep: Sequence[int]) -> None:
    """Let an attention take its columns of the bias that the first block makes for all."""
    before = getattr(module, "kept_heads", None)
    index = torch.tensor(keep, device=next(module.parameters()).device)
    chosen = index if before is None else before.to(index.device)[index]
    module.register_buffer("kept_heads", chosen, persistent=False)


def _adds(site: Site) -> bool:
    """Say whether an attention adds what the first block made."""
    return isinstance(site.declared, Attention) and site.declared.bias is not None


def _biased(site: Site) -> bool:
    """Say whether that has a column of its own for each head."""
    return isinstance(site.declared, Attention) and bool(site.declared.bias)


def _original(site: Site, keep: Sequence[int]) -> list[int]:
    """Return heads with a bias as its columns count them, some of which may be gone already."""
    before = getattr(site.module, "kept_heads", None)
    return list(keep) if before is None else before[list(keep)].tolist()


def _keep_biases(model: PreTrainedModel, found: Sequence[Site]) -> None:
    """Let blocks that keep different heads choose from one bias, in our attention function."""
    refuse_unequal(found)
    if any(_adds(site) for site in found):
        implement(model)


def _narrow_biases(found: Sequence[Site]) -> None:
    """Take the columns of removed heads out of the biases, once all blocks keep the same heads."""
    for site in filter(_adds, found):
        embedding = getattr(site.module, cast("Attention", site.declared).bias or "", None)
        if isinstance(embedding, nn.Embedding):
            keep = cast("Tensor", site.module.kept_heads)
            weight = cast("nn.Parameter", embedding.weight)
            embedding.weight = _selected(weight, 1, keep)
            embedding.embedding_dim = len(keep)
        del site.module.kept_heads


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
    said.pop(RECORD, None)
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


def parameters(model: PreTrainedModel) -> int:
    """Return how many parameters a model has; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
