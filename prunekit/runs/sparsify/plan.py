"""TODO-DOC prunekit/runs/sparsify/plan.py (out of prunekit/planning.py)."""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunekit.architectures import Architecture
from prunekit.checkpoint.reader import Checkpoint
from prunekit.config.run_config import Config
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.formatting import count, size
from prunekit.models.layout import (
    Block,
    Linear,
)
from prunekit.models.memory import free, free_host
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.hidden_states import Where
from prunekit.models.weight_names import stored_names
from prunekit.sparsify.memory_estimate import Memory
from prunekit.sparsify.permute_residual import Axes
from prunekit.sparsify.recipe import Recipe
from prunekit.sparsify.work_estimate import Work


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
    ranks: Ranks = SINGLE
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


def _asked(config: Config) -> Where | None:
    """Return where the user wants hidden states."""
    asked = config.calibration.hidden if config.calibration else "auto"
    return None if asked == "auto" else asked


def _available(device: torch.device, preflight: Preflight | None) -> tuple[int, int]:
    """Return the bytes that are free where blocks run, and of main memory."""
    if preflight and preflight.device_memory:
        return preflight.device_memory, preflight.host_memory or sys.maxsize
    return free(device), free_host()


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
    if not made.ranks.is_distributed:
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
