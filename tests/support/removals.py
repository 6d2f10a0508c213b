"""Removal of units in memory and from files, to be compared."""

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.architectures import find_architecture
from prunekit.checkpoint.output import OutputFolder
from prunekit.models.layout import stack_runners
from prunekit.models.load import load
from prunekit.models.orientation import weight_matrix
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.models.sequential.pipeline import iterate_blocks
from prunekit.models.sequential.weights import Weights
from prunekit.models.units.base import Kept, UnitGroup
from prunekit.models.units.find import unit_groups
from prunekit.models.units.heads_neurons import LinearUnitGroup
from prunekit.models.units.kinds import WHOLE, Kind
from prunekit.models.units.removal import apply_removal
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.structured.shards import UnitShards
from prunekit.runs.structured.smaller_model import SmallerModel
from prunekit.runs.structured.written import config_changes, remember_stored, written_tensors
from prunekit.structured.finalize import describe
from tests.support.structured import planned

Choice = Callable[[Sequence[UnitGroup]], dict[str, list[int]]]
"""Returns the kept units of each group."""
BATCHES = [torch.arange(3, 12).view(1, 9), torch.arange(60, 78).view(2, 9)]


def unit_plan(folder: Path, output: Path, kinds: Sequence[Kind], **keys: Any) -> StructuredPlan:
    """Return the plan of a run that removes units of some kinds.

    ``keys``: more keys of [prune].
    """
    given = {"method": "magnitude", "pattern": [*kinds], "sparsity": 0.5, **keys}
    lines = (f"{name} = {json.dumps(value)}" for name, value in given.items())
    return planned(folder, output, "\n".join(lines), evaluate=False)


def equal_units(groups: Sequence[UnitGroup]) -> dict[str, list[int]]:
    """Keep about half of each group, the same units in all."""
    kept = {}
    for group in groups:
        step = group.unit_multiple(1)
        count = max(group.units * 5 // 8 // step * step, 1)
        order = torch.randperm(group.units, generator=torch.Generator().manual_seed(1))
        kept[group.name] = sorted(order[:count].tolist())
    return kept


def unequal_units(groups: Sequence[UnitGroup]) -> dict[str, list[int]]:
    """Keep another number of units in each group of heads and neurons."""
    if groups[0].kind in WHOLE:
        return equal_units(groups)
    kept = {}
    for number, group in enumerate(groups):
        order = torch.randperm(group.units, generator=torch.Generator().manual_seed(number))
        kept[group.name] = sorted(order[: max(group.units // 2 + number % 3 - 1, 1)].tolist())
    return kept


def removed_in_memory(
    plan: StructuredPlan, choose: Choice, folder: Path, *, refitted: bool = False
) -> list[tuple[Kind, Kept]]:
    """Remove units from the whole model, write it and return the kept units by kind.

    Args:
        plan: The plan of a run.
        choose: The choice of units.
        folder: Folder of the smaller checkpoint, in one shard.
        refitted: Change the weights that read heads and neurons, block by block.
    """
    model = load(plan.checkpoint, plan.dtype)
    remember_stored(plan, model)
    before, removals = model.config.to_dict(), []
    for kind in plan.groups:
        groups = unit_groups(model, kind)
        removals.append((kind, choose(groups)))
        if kind in WHOLE:
            _remove(plan, model, *removals[-1])
    rest = [each for each in removals if each[0] not in WHOLE]
    if refitted:
        stacks = stack_runners(model, find_architecture(model))
        for loaded in iterate_blocks(model, stacks, None, BATCHES):
            change_readers(loaded, model, rest)
    for each in rest:
        _remove(plan, model, *each)
    blocks = dict(removals).get("blocks", {})
    changed, dropped = config_changes(plan, before, model.config.to_dict(), blocks)
    config = plan.checkpoint.config | changed
    config = {key: value for key, value in config.items() if key not in dropped}
    output = OutputFolder(folder, 1)
    output.begin("the same", resume=False, overwrite=False)
    output.write_shard(1, written_tensors(plan, model, blocks))
    output.finish(replace(plan.checkpoint, config=config), None)
    output.close()
    return removals


def _remove(plan: StructuredPlan, model: PreTrainedModel, kind: Kind, kept: Kept) -> None:
    groups = unit_groups(model, kind)
    entries, _ = describe(model, groups, kept, stock=plan.config.prune.uniform)
    apply_removal(model, groups, kept, entries)


@torch.no_grad()
def change_readers(
    loaded: LoadedBlock, model: PreTrainedModel, removals: Sequence[tuple[Kind, Kept]]
) -> dict[str, Tensor]:
    """Change what reads heads and neurons, as a refit does, by the input of the block.

    Args:
        loaded: The block.
        model: Its model.
        removals: Kept heads and neurons; the columns of others become 0.

    Returns:
        The changed tensors by their names in the model.
    """
    shift = torch.cat([hidden.float().flatten() for hidden in loaded.hidden]).std().tanh()
    names = {module: name for name, module in model.named_modules()}
    inside, changed = {*loaded.module.modules()}, {}
    for kind, kept in removals:
        for group in cast("list[LinearUnitGroup]", unit_groups(model, kind)):
            linear = cast("Any", group.reader.linear)
            if linear not in inside:
                continue
            removed = torch.ones(group.units, dtype=torch.bool)
            removed[kept[group.name]] = False
            weight = weight_matrix(linear)
            weight *= 1 + shift
            weight[:, group.reader.index[removed].flatten()] = 0
            changed[f"{names[linear]}.weight"] = linear.weight
            if linear.bias is not None:
                linear.bias += shift
                changed[f"{names[linear]}.bias"] = linear.bias
    return changed


def removed_from_files(
    plan: StructuredPlan,
    removals: Sequence[tuple[Kind, Kept]],
    *,
    refitted: bool = False,
    resume: bool = False,
) -> Generator[str, None, None]:
    """Write the smaller checkpoint block by block; yield the name of each block.

    Args:
        plan: The plan of a run, whose output folder is written.
        removals: Kept units by kind, in the order of the removal.
        refitted: As for :func:`removed_in_memory`.
        resume: Continue a run that was stopped.
    """
    output = OutputFolder(Path(plan.config.output.path), 0)
    output.begin("the same", resume=resume, overwrite=False)
    try:
        shards = UnitShards(plan, SmallerModel(plan, removals), output)
        shards.begin()
        yield "rest"
        blocks = (
            _changed_blocks(plan, removals) if refitted else ((None, None),) * len(shards.blocks)
        )
        for number, (name, (loaded, change)) in enumerate(zip(shards.blocks, blocks, strict=True)):
            if ("block", name) not in output.journal:
                values = shards.write_block(number, loaded, change and change())
                output.append_journal("block", name, values)
            elif loaded:
                shards.restore_block(loaded, number)
            yield name
        shards.finish(None)
    finally:
        output.close()


def _changed_blocks(
    plan: StructuredPlan, removals: Sequence[tuple[Kind, Kept]]
) -> Iterator[tuple[LoadedBlock, Callable[[], Mapping[str, Tensor]]]]:
    """Yield each block, loaded, and a function that changes it."""
    smaller = SmallerModel(plan, [each for each in removals if each[0] in WHOLE])
    rest = [each for each in removals if each[0] not in WHOLE]
    weights = Weights(smaller.model, smaller.checkpoint, plan.dtype, plan.device)
    for loaded in iterate_blocks(smaller.model, smaller.stacks, weights, BATCHES):
        yield loaded, lambda loaded=loaded: change_readers(loaded, smaller.model, rest)
