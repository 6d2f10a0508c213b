"""Every decision taken before weights are read; whatever can fail, fails here."""

import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import reduce
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunekit.allocations.uniform import Uniform
from prunekit.architectures import Architecture, find
from prunekit.checkpoint import Checkpoint, open_checkpoint
from prunekit.checkpoint import find as find_checkpoint
from prunekit.config import Config, ShrinkConfig
from prunekit.errors import CapacityError, ConfigError
from prunekit.evaluation import (
    compute_dtype,
    device_of,
    is_causal_language_model,
    load_tokenizer,
    stored_dtype,
)
from prunekit.footprint import Circumstances, Memory, Work, memory, traffic, work
from prunekit.generation import AT_ONCE
from prunekit.layout import Block, Linear, Selection, layout, runners
from prunekit.loading import empty_model, has_weights, longest, outline, stored_names
from prunekit.output import nearest_folder
from prunekit.patterns.base import Grouped
from prunekit.permutation import check_permutable
from prunekit.placement import Where
from prunekit.pruning import Recipe
from prunekit.ranks import ALONE, Ranks
from prunekit.residual import Axes, check_moves, residual_axes
from prunekit.room import free, free_host, neighbours
from prunekit.sections import Prune
from prunekit.stack import StackRunner
from prunekit.units import count, size


@dataclass(frozen=True)
class Preflight:
    """A plan for another machine, of a model whose weights need not be here.

    Attributes:
        device_memory: Bytes of each of its GPUs; None for this machine's own device.
        host_memory: Bytes of main memory for each process; None for as much as it takes.
    """

    device_memory: int | None = None
    host_memory: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will do; made by :func:`plan`.

    Attributes:
        config: What the user wrote.
        checkpoint: The model's files.
        model: The model without weights.
        architecture: Where it keeps its blocks.
        tokenizer: The tokenizer beside the checkpoint.
        stacks: Runners of its stacks.
        blocks: Its blocks and linears, in run order.
        recipe: How blocks are pruned.
        device: Where blocks run.
        dtype: The type in which they run.
        stored: Name of each linear → the type in which its weight is written.
        axes: Where coordinates of the residual stream lie that get another order, if they do.
        lengths: Tokens of a calibration sample and of an evaluation window, after the cap.
        memory: Peak bytes of the busiest rank.
        work: Operations of each rank.
        traffic: Bytes that each rank sends, by what they are for.
        notes: What the user should know: caps, skipped layers, probing.
        ranks: The processes that carry it out; memory is that of each.
        preflight: What is assumed of another machine, where the plan is only to be looked at.
    """

    config: Config
    checkpoint: Checkpoint
    model: PreTrainedModel
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    stacks: list[StackRunner]
    blocks: list[Block]
    recipe: Recipe
    device: torch.device
    dtype: torch.dtype
    stored: dict[str, torch.dtype]
    axes: Axes
    lengths: tuple[int, int]
    memory: Memory
    work: Work
    traffic: Mapping[str, int]
    notes: tuple[str, ...]
    ranks: Ranks = ALONE
    preflight: Preflight | None = None

    @property
    def available(self) -> int:
        """Bytes that are free where blocks run, or that the user says will be."""
        return _available(self.device, self.preflight)[0]

    @property
    def linears(self) -> list[Linear]:
        """All linears in pruning order, the skipped ones too."""
        return [linear for block in self.blocks for linear in block.linears]

    @property
    def sizes(self) -> dict[str, int]:
        """Weights of each linear that is pruned."""
        return {linear.name: linear.size for linear in self.linears if linear.skipped is None}

    @property
    def parameters(self) -> int:
        """Parameters of the model; tied ones count once."""
        stored = set(stored_names(self.model, self.checkpoint).values())
        return sum(math.prod(self.checkpoint.entries[name].shape) for name in stored)

    def describe(self) -> RenderableType:
        """Return the plan as a table to print."""
        return _describe(self)


def plan(config: Config, ranks: Ranks = ALONE, preflight: Preflight | None = None) -> Plan:
    """Decide everything that can be decided from ``config.json`` and safetensors headers.

    Args:
        config: What the user wrote.
        ranks: The processes that will share the run, from :func:`prunekit.join`.
        preflight: For a plan that is only to be looked at.

    Raises:
        PrunekitError: Something cannot work; nothing was written and no weight read.
    """
    folder = find_checkpoint(config.model.path, config.model.revision)
    outlined = preflight is not None and not has_weights(folder)
    checkpoint = outline(folder) if outlined else open_checkpoint(folder)
    model = empty_model(checkpoint)
    architecture = find(model)
    stacks = runners(model, architecture)
    check_judged(config, model, stacks)
    check_writes(config, model, stacks)
    prune = config.prune
    blocks = layout(stacks, Selection(prune.pattern, prune.skip, prune.on_indivisible))
    _check_skips(config, model, blocks)
    elsewhere = preflight is not None and preflight.device_memory is not None
    device = torch.device("cuda") if elsewhere else device_of(config.model.device)
    device = device if preflight else ranks.place(device)
    asked = None if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    lengths, notes = capped(config, longest(model))
    recipe = Recipe.of(prune, calibrated=config.calibration is not None)
    recipe.check(blocks)
    if recipe.permute:
        check_permutable(model, stacks)
    names, axes = stored_names(model, checkpoint), {}
    if recipe.permute == "residual":
        axes = residual_axes(model)
        check_moves(model, checkpoint, names)
    stored = _stored(names, checkpoint, blocks, asked)
    dtype = compute_dtype(_widest(asked or stored_dtype(checkpoint), blocks, stored), device)
    # CPUs of ranks may differ; in the wider type all can run.
    dtype = reduce(torch.promote_types, ranks.exchange(dtype))
    share = _share(config, ranks), lengths[0]
    given = Circumstances(device, dtype, stored, share, ranks)
    needs = replace(
        memory(model, stacks, blocks, recipe, given),
        writer=writer_memory(
            config, model, stacks, lengths[0], compute_dtype(stored_dtype(checkpoint), device)
        ),
    ).placed(_asked(config), *_available(device, preflight))
    made = Plan(
        config=config,
        checkpoint=checkpoint,
        model=model,
        architecture=architecture,
        # Nothing is tokenised for a plan that is only looked at.
        tokenizer=cast("Any", None) if outlined else load_tokenizer(checkpoint),
        stacks=stacks,
        blocks=blocks,
        recipe=recipe,
        device=device,
        dtype=dtype,
        stored=stored,
        axes=axes,
        lengths=lengths,
        memory=needs,
        work=work(blocks, recipe, given),
        traffic=traffic(blocks, recipe, given),
        notes=(*notes, *_promises(recipe), *_remarks(architecture, model, blocks)),
        ranks=ranks,
        preflight=preflight,
    )
    _check_format(made)
    _check_capacity(made)
    return made


def _check_format(made: Plan) -> None:
    expert = next((linear.name for linear in made.linears if linear.expert), None)
    if expert and made.config.output.format != "dense":
        raise ConfigError(
            f'output.format: transformers cannot open {expert} and other experts unless "dense".'
        )


def _share(config: Config, ranks: Ranks) -> int:
    """Return how many calibration samples the busiest rank has."""
    samples = config.calibration.samples if config.calibration else 1
    if config.calibration and samples < ranks.size:
        raise ConfigError(
            f"calibration.samples: {samples} cannot be shared by {ranks.size} processes. Start "
            "fewer, or use more samples."
        )
    return -(-samples // ranks.size)


def check_judged(
    config: Config | ShrinkConfig, model: PreTrainedModel, stacks: list[StackRunner]
) -> None:
    """Refuse to measure the perplexity of what has none.

    Raises:
        ConfigError: It is asked for, and the model is not a causal language model.
    """
    if config.evaluate and not is_causal_language_model(model, stacks):
        raise ConfigError(
            f"{config.model.path}: {type(model).__name__} has no perplexity, which is for causal "
            "language models. Leave out [evaluate]."
        )


def check_writes(
    config: Config | ShrinkConfig, model: PreTrainedModel, stacks: list[StackRunner]
) -> None:
    """Refuse to calibrate on what a model writes that writes nothing.

    Raises:
        ConfigError: So it is.
    """
    own = config.calibration and config.calibration.own
    writes = is_causal_language_model(model, stacks) and model.config.architectures
    if own and not writes:
        raise ConfigError(
            f'calibration.data: {type(model).__name__} does not write text, as "self" asks. Name '
            "texts."
        )


def writer_memory(
    config: Config | ShrinkConfig,
    model: PreTrainedModel,
    stacks: list[StackRunner],
    length: int,
    dtype: torch.dtype,
) -> int:
    """Return the bytes that the whole model takes to write its calibration text; 0 if it does not.

    The cache is counted as if all heads had keys of their own.
    """
    if not (config.calibration and config.calibration.own):
        return 0
    blocks = sum(len(runner.blocks) for runner in stacks)
    width = max(runner.features for runner in stacks)
    cache = 2 * min(AT_ONCE, config.calibration.samples) * length * blocks * width
    return (sum(value.numel() for value in model.parameters()) + cache) * dtype.itemsize


def capped(config: Config | ShrinkConfig, limit: int) -> tuple[tuple[int, int], list[str]]:
    """Return the tokens of a calibration sample and of an evaluation window, and what to say."""
    asked = {
        "calibration.length": config.calibration.length if config.calibration else 1,
        "evaluate.length": config.evaluate.length if config.evaluate else 1,
    }
    notes = [
        f"{key} shortened from {length} to {limit} tokens, the most this model takes."
        for key, length in asked.items()
        if length > limit
    ]
    calibration, evaluation = (min(length, limit) for length in asked.values())
    return (calibration, evaluation), notes


def _promises(recipe: Recipe) -> Iterator[str]:
    """Say what users of the checkpoint should know."""
    if recipe.permute:
        stream = ", and the coordinates of the residual stream" * (recipe.permute == "residual")
        yield (
            f"Neurons, and channels within heads{stream}, are put in another order: weights do not "
            "lie where those of the dense model do."
        )
    if recipe.recover == "lowrank":
        yield (
            "The checkpoint is to be used with the LoRA adapter beside it, by peft: its blocks "
            "were pruned on what those before give with it. Perplexity after is measured with it."
        )


def _remarks(architecture: Architecture, model: PreTrainedModel, blocks: list[Block]) -> list[str]:
    notes = [
        f"{linear.name} stays dense: {linear.skipped}."
        for block in blocks
        for linear in block.linears
        if linear.skipped
    ]
    if architecture.probed:
        notes.insert(
            0,
            f"Model type {model.config.model_type!r} is not declared; its blocks and stages were "
            "found by probing: look at the list of layers.",
        )
    return notes


def _stored(
    names: Mapping[str, str],
    checkpoint: Checkpoint,
    blocks: list[Block],
    asked: torch.dtype | None,
) -> dict[str, torch.dtype]:
    return {
        linear.name: asked or checkpoint.entries[names[f"{linear.name}.weight"]].dtype
        for block in blocks
        for linear in block.linears
    }


def _widest(dtype: torch.dtype, blocks: list[Block], stored: dict[str, torch.dtype]) -> torch.dtype:
    """Return the type that holds ``dtype`` and each weight that is pruned, so none is rounded."""
    pruned = (stored[linear.name] for block in blocks for linear in block.pruned)
    return reduce(torch.promote_types, pruned, dtype)


def _check_skips(config: Config, model: PreTrainedModel, blocks: list[Block]) -> None:
    linears = [linear for block in blocks for linear in block.linears]
    if all(linear.skipped for linear in linears):
        raise ConfigError("prune: every linear of the model is skipped; nothing would be pruned.")
    _check_takes(config.prune, [linear for linear in linears if not linear.skipped])
    names = [name for name, _ in model.named_modules()]
    names += [linear.path for linear in linears]
    for skip in config.prune.skip:
        if not any(fnmatch(name, skip) for name in names):
            raise ConfigError(
                f'prune.skip: "{skip}" matches no module. Names look like {linears[0].name}; '
                "* stands for any characters."
            )


def _check_takes(prune: Prune, pruned: list[Linear]) -> None:
    """Refuse a sparsity that rounds to nothing in every layer."""
    pattern, sparsity = prune.pattern, prune.sparsity
    if not (sparsity and isinstance(prune.allocation, Uniform) and isinstance(pattern, Grouped)):
        return
    if not any(any(pattern.groups(one.outputs, one.inputs, sparsity).pruned) for one in pruned):
        raise ConfigError(
            f'prune.sparsity: {sparsity:g} takes nothing of any layer by pattern "{pattern.name}", '
            f"for one of {pruned[0].name}, {pruned[0].outputs} × {pruned[0].inputs}. Raise it, or "
            "choose another pattern."
        )


def _asked(config: Config) -> Where | None:
    """Return where the user wants hidden states."""
    asked = config.calibration.hidden if config.calibration else "auto"
    return None if asked == "auto" else asked


def _available(device: torch.device, preflight: Preflight | None) -> tuple[int, int]:
    """Return the bytes that are free where blocks run, and of main memory."""
    if preflight and preflight.device_memory:
        return preflight.device_memory, preflight.host_memory or sys.maxsize
    return free(device), free_host()


def _check_capacity(made: Plan) -> None:
    available, host = _available(made.device, made.preflight)
    if made.memory.apart and made.memory.host > host:
        raise CapacityError(
            f"memory: the run needs about {size(made.memory.host)} of main memory, {size(host)} "
            "are free"
            + (
                '. Set calibration.hidden = "disk".'
                if made.memory.where == "host"
                else " for each process. Start fewer."
            )
        )
    if made.memory.total > available:
        raise CapacityError(
            f"memory: the run needs about {size(made.memory.total)} on {made.device}, "
            f"{size(available)} are free. Lower calibration.samples or calibration.length"
            + (", or set measure_error = false." if made.recipe.measure_error else ".")
        )
    if made.preflight and made.preflight.device_memory:
        return  # its disk is not here
    check_disk(made.config.output.path, made.checkpoint.nbytes + made.memory.disk * neighbours())


def check_disk(path: str, needed: int) -> None:
    """Refuse an output folder that cannot be written.

    Raises:
        ConfigError: It is a file, or would be below one.
        CapacityError: It is not ours to write to, or too little is free.
    """
    existing = nearest_folder(Path(path))
    if not os.access(existing, os.W_OK):
        raise CapacityError(f"output.path: {existing} cannot be written to.")
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CapacityError(
            f"output.path: {existing} has {size(free)} free, the checkpoint needs {size(needed)}."
        )


def _describe(made: Plan) -> RenderableType:
    config, prune = made.config, made.config.prune
    facts = Table.grid(padding=(0, 2))
    rows = {
        "model": f"{config.model.path}  ({type(made.model).__name__}, "
        f"{count(made.parameters)} parameters, {len(made.blocks)} blocks)",
        "prune": f"{prune.method.name}, {prune.pattern.name}, sparsity {prune.sparsity:g}, "
        f"allocation {prune.allocation.name}, propagation {prune.propagation}, steps {prune.steps}",
        "gathers": ", ".join(kind.name for kind in made.recipe.needs) or "nothing",
        "runs": f"on {made.device} in {str(made.dtype).removeprefix('torch.')}",
        "ranks": f"{made.ranks.size}: samples and rows are shared; memory is that of each",
        "output": f"{config.output.path}  ({size(made.checkpoint.nbytes)})",
        "memory": _held(made.memory),
        "hidden states": _placement(made),
        "operations": _operations(made.work),
        "traffic": "each process sends "
        + ", ".join(f"{size(sent)} of {what}" for what, sent in made.traffic.items()),
    }
    if config.calibration:
        rows["calibration"] = (
            f"{config.calibration.samples} samples of {made.lengths[0]} tokens, seed "
            f"{config.calibration.seed}"
        )
    if not made.ranks.several:
        del rows["ranks"], rows["traffic"]
    for key, value in rows.items():
        facts.add_row(f"[bold]{key}", value)
    table = Table(title=f"{len(made.sizes)} of {len(made.linears)} linears are pruned")
    for header in ("layer", "outputs × inputs", "stored as"):
        table.add_column(header)
    for pattern, linears in _alike(made).items():
        path, shape, dtype, skipped = pattern
        name = f"{path}  ×{len(linears)}" + ("  (dense)" if skipped else "")
        table.add_row(name, shape, str(dtype).removeprefix("torch."))
    return Group(facts, "", table, *[f"[yellow]note[/] {note}" for note in made.notes[:20]])


def _held(memory: Memory) -> str:
    parts = {
        "block": memory.block,
        **({"the next one": memory.ahead} if memory.ahead else {}),
        "statistics": memory.statistics,
        "solving": memory.solve,
        "results": memory.results,
        **({"hidden states": memory.hidden} if memory.where == "device" else {}),
        "activations": memory.activations,
    }
    said = ", ".join(f"{name} {size(value)}" for name, value in parts.items())
    where = f" on the device and {size(memory.host)} of main memory" if memory.apart else ""
    return f"about {size(memory.total)}{where}: {said}; embeddings or head {size(memory.ends)}"


def _placement(made: Plan) -> str:
    """Say where hidden states are kept, and why."""
    needs, (device, host) = made.memory, _available(made.device, made.preflight)
    places = {
        "device": f"on {made.device}",
        "host": "in main memory",
        "disk": f"in a file in {made.config.output.path}",
    }
    if made.config.calibration is None or not needs.hidden:
        return "none"
    told = f"{size(needs.hidden)} {places[needs.where]}"
    if _asked(made.config):
        return f"{told}, as calibration.hidden asks"
    near = replace(needs, where="device")
    why = [
        f"with them {made.device} would need {size(near.total)}, {size(device)} are free"
        if needs.where != "device"
        else "where blocks run; it has room"
    ]
    if needs.apart and needs.where == "disk":
        beside = replace(needs, where="host")
        why.append(f"main memory {size(beside.host)}, {size(host)} are free")
    return f"{told}: {'; '.join(why)}"


def _operations(work: Work) -> str:
    most, mean = max(work.solve), sum(work.solve) / len(work.solve)
    spread = f" (at most {most / mean:.3f} of the mean)" if len(work.solve) > 1 and mean else ""
    parts = {"forward": work.forward, "gathering": work.gather, f"solving{spread}": most}
    return ", ".join(f"{name} {value / 1e12:.3g}" for name, value in parts.items()) + " TFLOP"


def _alike(made: Plan) -> dict[tuple, list[Linear]]:
    """Group linears that differ only in the number of their block."""
    groups: dict[tuple, list[Linear]] = {}
    for linear in made.linears:
        name = re.sub(r"\.\d+\.", ".*.", linear.name)
        key = (
            name,
            f"{linear.outputs} × {linear.inputs}",
            made.stored[linear.name],
            linear.skipped,
        )
        groups.setdefault(key, []).append(linear)
    return groups
