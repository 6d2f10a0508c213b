"""Removal of units from a model whose weights are in files.

The units are removed from a model without weights; its checkpoint is replaced by one in which each
tensor is cut when it is read. Both can then be used like any other model and its checkpoint.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.checkpoint.parts import is_whole, whole_tensors
from prunekit.checkpoint.reader import Checkpoint
from prunekit.checkpoint.views import TensorView
from prunekit.errors import ShapeError
from prunekit.models.units.base import Kept, UnitGroup
from prunekit.models.units.block_names import Source, tensor_sources
from prunekit.models.units.blocks import BlockGroup
from prunekit.models.units.experts import ExpertGroup
from prunekit.models.units.narrowing import recorded_steps
from prunekit.models.units.removal import apply_removal
from prunekit.models.units.replay import Replay, replays
from prunekit.models.weight_names import stored_names


def cut_checkpoint(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    groups: Sequence[UnitGroup],
    kept: Kept,
    entries: Mapping[str, Any] | None,
    dtype: torch.dtype,
) -> tuple[Checkpoint, dict[str, Replay]]:
    """Remove units from a model without weights and its checkpoint.

    Args:
        model: The model, on the meta device, tied as it would be with its weights; it is changed in
            place.
        checkpoint: Its weights.
        groups: All groups of one kind, as they are now.
        kept: Kept units of each group.
        entries: As for :func:`prunekit.models.units.removal.apply_removal`.
        dtype: Type in which the model would run; values that the removal changes are computed in
            it, and read in it.

    Returns:
        The checkpoint of the smaller model, with the config of the whole one, and the replay of
        each of its tensors, by its name in the model.
    """
    stored, before = stored_names(model, checkpoint), model.state_dict(keep_vars=True)
    lists = [group for group in groups if isinstance(group, BlockGroup | ExpertGroup)]
    sources = tensor_sources(lists, kept, stored, checkpoint.entries)
    with recorded_steps() as steps:
        apply_removal(model, groups, kept, entries)
    after = model.state_dict(keep_vars=True)
    found = replays(before, after, steps, dtype)
    cut, views = {}, {}
    for name, source in sources.items():
        replay = found.get(source.name or "")
        if not is_whole(source.stored):  # the tensors that it is in have sources of their own
            _check_same(source, replay, checkpoint)
            continue
        if source.name is not None and replay is None:
            continue  # of an attention or feed-forward that is removed as a whole
        entry, view = checkpoint.entries[source.stored], checkpoint.views.get(source.stored)
        shape, change = source.shape(entry.shape), source.of if source.matrices else None
        if replay and not replay.is_trivial:
            shape, change = tuple(after[source.name or ""].shape), replay.of
        if change:
            entry = replace(entry, shape=shape, nbytes=math.prod(shape) * entry.dtype.itemsize)
            view = (view or TensorView(source.stored, _same)).then(change)
        if view or name != source.stored:
            views[name] = view or TensorView(source.stored, _same)
        cut[name] = entry
    return replace(checkpoint, entries=cut, views=views), found


def _same(stored: Tensor) -> Tensor:
    return stored


def _check_same(source: Source, replay: Replay | None, checkpoint: Checkpoint) -> None:
    """Refuse to cut a part of a tensor.

    Args:
        source: Source of the part.
        replay: Its replay; None if it is removed as a whole.
        checkpoint: The files.

    Raises:
        ShapeError: The removal changes the part.
    """
    if replay is None or not replay.is_trivial:
        raise _cut_of_a_part(source.name, source.stored, checkpoint)


def check_whole(
    groups: Sequence[UnitGroup], model: PreTrainedModel, checkpoint: Checkpoint
) -> None:
    """Refuse groups whose removal cuts a tensor within another.

    Raises:
        ShapeError: There is such a tensor.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    stored = stored_names(model, checkpoint)
    for axis in (axis for group in groups for axis in group.parameter_axes):
        name = names[axis.parameter]
        if not is_whole(stored[name]):
            raise _cut_of_a_part(name, stored[name], checkpoint)


def _cut_of_a_part(name: str | None, stored: str, checkpoint: Checkpoint) -> ShapeError:
    whole, *_ = whole_tensors([stored])
    return ShapeError(
        f"{checkpoint.entries[whole].file}: the model's {name} is {stored}, and only a tensor that "
        "is stored by itself can be cut. Where transformers loads it as one, open the model and "
        "save it again with save_pretrained(..., save_original_format=False); else take out units "
        "of another kind."
    )
