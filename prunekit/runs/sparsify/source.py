"""The model of a run that prunes weights, opened without reading any."""

from collections.abc import Mapping
from fnmatch import fnmatch
from functools import reduce
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from prunekit.allocations.uniform import Uniform
from prunekit.architectures import Architecture
from prunekit.checkpoint.parts import is_whole, whole_tensors
from prunekit.checkpoint.reader import Checkpoint
from prunekit.config.prune_table import Prune
from prunekit.config.run_config import Config
from prunekit.errors import ConfigError
from prunekit.models.dense_weights import dense_notes, outside_note
from prunekit.models.devices import stored_dtype
from prunekit.models.empty_model import empty_model
from prunekit.models.layout import Block, Linear, LinearSelection, list_blocks, stack_runners
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.weight_names import stored_names
from prunekit.patterns.base import Grouped
from prunekit.runs.checks import check_generates_text
from prunekit.runs.image_data import architecture_of_part
from prunekit.runs.preflight import Preflight, planned_checkpoint
from prunekit.runs.texts import check_data


class Source(NamedTuple):
    """The model to prune, from ``config.json`` and safetensors headers."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    architecture: Architecture
    stacks: list[StackRunner]
    blocks: list[Block]
    config_only: bool


def open_source(config: Config, preflight: Preflight | None) -> Source:
    """Return the model on the meta device, checked against the config.

    Args:
        config: The user's config.
        preflight: Memory of another machine; the weights may then be missing here.

    Raises:
        PrunekitError: The model cannot be pruned as the config says.
    """
    checkpoint, config_only = planned_checkpoint(config, preflight)
    model = empty_model(checkpoint)
    architecture = architecture_of_part(config, checkpoint, model)
    stacks = stack_runners(model, architecture)
    check_data(config, model, stacks)
    check_generates_text(config, model, stacks)
    prune = config.prune
    blocks = list_blocks(stacks, LinearSelection(prune.pattern, prune.skip, prune.on_indivisible))
    _check_skips(config, model, blocks)
    if config.output.format != "dense":
        _check_storable(blocks, stored_names(model, checkpoint))
    return Source(checkpoint, model, architecture, stacks, blocks, config_only)


def written_dtypes(config: Config, source: Source) -> tuple[dict[str, torch.dtype], torch.dtype]:
    """Return each linear's stored dtype, and one that rounds no pruned weight."""
    checkpoint, blocks = source.checkpoint, source.blocks
    entries, names = checkpoint.entries, stored_names(source.model, checkpoint)
    dtype = None if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    stored = {
        linear.name: dtype or entries[whole_tensors([names[f"{linear.name}.weight"]])[0]].dtype
        for block in blocks
        for linear in block.linears
    }
    pruned = (stored[linear.name] for block in blocks for linear in block.pruned)
    return stored, reduce(torch.promote_types, pruned, dtype or stored_dtype(checkpoint))


def layer_notes(source: Source) -> list[str]:
    """Return notes about probing and about linears that are not pruned."""
    notes = [
        f"{linear.name} stays dense: {linear.skipped}."
        for block in source.blocks
        for linear in block.linears
        if linear.skipped
    ]
    notes += dense_notes(source.stacks)
    if source.architecture.probed:
        notes += outside_note(source.model, source.stacks)
        notes.insert(
            0,
            f"Model type {source.model.config.model_type!r} is not declared; its blocks and stages "
            "were found by probing: look at the list of layers.",
        )
    return notes


def _check_storable(blocks: list[Block], stored: Mapping[str, str]) -> None:
    """Refuse compressed formats that transformers could not open."""
    for linear in (linear for block in blocks for linear in block.linears):
        if linear.expert:
            raise ConfigError(
                f"output.format: transformers cannot open {linear.name} and other experts unless "
                '"dense".'
            )
        if not is_whole(stored[f"{linear.name}.weight"]):
            raise ConfigError(
                f"output.format: transformers converts {stored[f'{linear.name}.weight']} on "
                f'loading to {linear.name}, which it cannot unless "dense".'
            )


def _check_skips(config: Config, model: PreTrainedModel, blocks: list[Block]) -> None:
    """Refuse a ``skip`` without a match, and a run that prunes nothing."""
    linears = [linear for block in blocks for linear in block.linears]
    if all(linear.skipped for linear in linears):
        raise ConfigError("prune: every linear of the model is skipped; nothing would be pruned.")
    _check_prunes_some(config.prune, [linear for linear in linears if not linear.skipped])
    names = [name for name, _ in model.named_modules()]
    names += [linear.path for linear in linears]
    for skip in config.prune.skip:
        if not any(fnmatch(name, skip) for name in names):
            raise ConfigError(
                f'prune.skip: "{skip}" matches no module. Names look like {linears[0].name}; '
                "* stands for any characters."
            )


def _check_prunes_some(prune: Prune, pruned: list[Linear]) -> None:
    """Refuse a sparsity that rounds to zero pruned weights in every layer."""
    pattern, sparsity = prune.pattern, prune.sparsity
    if not (sparsity and isinstance(prune.allocation, Uniform) and isinstance(pattern, Grouped)):
        return
    if not any(any(pattern.groups(one.outputs, one.inputs, sparsity).pruned) for one in pruned):
        raise ConfigError(
            f'prune.sparsity: {sparsity:g} takes nothing of any layer by pattern "{pattern.name}", '
            f"for one of {pruned[0].name}, {pruned[0].outputs} × {pruned[0].inputs}. Raise it, or "
            "choose another pattern."
        )
