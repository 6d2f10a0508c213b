"""Takes units out of a model for good: smaller matrices, the same answers.

Where all blocks keep equally many, the config can say so and the model is a stock one. Where they
do not, the config says which units are left (``RECORD``), and that transformers needs prunekit to
open the folder.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunekit.architectures import Attention
from prunekit.checkpoint.compressed import OPENS, RECORD
from prunekit.models.attention_hook import configs, implement, refuse_unseen
from prunekit.models.units.base import UnitGroup
from prunekit.models.units.blocks import Depth, remove_blocks
from prunekit.models.units.heads_neurons import Site, counts, known, matrix
from prunekit.models.units.hidden import Width, remove_hidden

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


def refuse_unequal(found: Sequence[Site]) -> None:
    """Refuse blocks of different heads where they share a bias and none can choose from it.

    Raises:
        CheckpointError: This transformers computes their attention by itself.
    """
    refuse_unseen(site.module for site in found if _adds(site))


def apply_removal(
    model: PreTrainedModel,
    found: Sequence[UnitGroup],
    kept: Kept,
    entries: Mapping[str, Any] | None,
) -> None:
    """Remove all but the kept units and let the config say what is left.

    Args:
        model: Changed in place.
        found: All places of one kind, as they are now.
        kept: Their units that stay.
        entries: What :func:`prunekit.models.units.stock_config.stock_entries` returned; None, of heads and neurons,
            records the units instead.
    """
    first = found[0]
    if isinstance(first, Depth):
        remove_blocks(model, cast("Sequence[Depth]", found), kept, entries or {})
    elif isinstance(first, Width):
        remove_hidden(model, first, kept[first.name], entries or {})
        _configure(model, entries or {})
    else:
        _settle(model, cast("Sequence[Site]", found), kept, entries)


def _settle(
    model: PreTrainedModel, found: Sequence[Site], kept: Kept, entries: Mapping[str, Any] | None
) -> None:
    record: dict[str, int | list[int]] = {
        site.name: original(site, kept[site.name]) if biased(site) else len(kept[site.name])
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
        _configure(model, entries)
    if others or record:
        setattr(model.config, RECORD, {**others, **record})
        _mark(model)
    elif said:
        delattr(model.config, RECORD)
        if not storage(model)["linears"]:
            delattr(model.config, "quantization_config")


def _configure(model: PreTrainedModel, entries: Mapping[str, Any]) -> None:
    for config in configs(model):
        for name, value in entries.items():
            setattr(config, name, value)


def storage(model: PreTrainedModel) -> dict[str, Any]:
    """Return what the config says of how weights are stored."""
    said = model.config.quantization_config
    return said if isinstance(said, dict) else said.to_dict()


def restore(model: PreTrainedModel) -> None:
    """Give a model that was built from a config with a record the shapes that it speaks of."""
    record: dict[str, int | list[int]] = getattr(model.config, RECORD, {})
    if not record:
        return
    _mark(model)
    with torch.device("cpu"):  # transformers builds models where nothing can be counted
        for found in (known(model, "heads"), known(model, "neurons")):
            for site in found:
                left = record.get(site.name, site.units)
                remove(site, range(left) if isinstance(left, int) else left)
            _keep_biases(model, found)


def _mark(model: PreTrainedModel) -> None:
    if not hasattr(model.config, "quantization_config"):
        model.config.quantization_config = dict(OPENS)


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


def _choose_bias(module: Any, keep: Sequence[int]) -> None:  # noqa: ANN401
    """Let an attention take its columns of the bias that the first block makes for all."""
    # No buffer: transformers fills those that no file holds with whatever memory held.
    before = getattr(module, "kept_heads", None)
    module.kept_heads = [*keep] if before is None else [before[head] for head in keep]


def _adds(site: Site) -> bool:
    """Say whether an attention adds what the first block made."""
    return isinstance(site.declared, Attention) and site.declared.bias is not None


def biased(site: Site) -> bool:
    """Say whether that has a column of its own for each head."""
    return isinstance(site.declared, Attention) and bool(site.declared.bias)


def original(site: Site, keep: Sequence[int]) -> list[int]:
    """Return heads with a bias as its columns count them, some of which may be gone already."""
    before = getattr(site.module, "kept_heads", None)
    return list(keep) if before is None else [before[head] for head in keep]


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
            keep = torch.tensor(site.module.kept_heads)
            weight = cast("nn.Parameter", embedding.weight)
            embedding.weight = _selected(weight, 1, keep)
            embedding.embedding_dim = len(keep)
        del site.module.kept_heads


def parameters(model: PreTrainedModel) -> int:
    """Return how many parameters a model has; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
