"""Plan of a sparsify run, and its printed form."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prunekit.architectures import Architecture
from prunekit.config.run_config import Config
from prunekit.formatting import count, size
from prunekit.models.layout import Block, Linear
from prunekit.runs.plan_base import PlanBase, fact_table, note_lines
from prunekit.runs.preflight import Preflight, available_memory, requested_placement
from prunekit.runs.sparsify.quantization import quantization_words, quantized_bytes
from prunekit.runs.texts import data_words
from prunekit.runs.time_estimate import operations_text
from prunekit.sparsify.memory_estimate import Memory
from prunekit.sparsify.permute_residual import Axes
from prunekit.sparsify.recipe import Recipe
from prunekit.sparsify.work_estimate import Work


@dataclass(frozen=True, kw_only=True, repr=False)
class WeightsPlan(PlanBase):
    """Decisions about a run that sets weights to zero.

    Attributes:
        config: The user's config.
        architecture: Where the model family keeps its blocks and linears.
        blocks: Blocks with their linears, in run order.
        recipe: How blocks are pruned.
        stored: Name of each linear → dtype in which its weight is written.
        preflight: Memory of another machine, for a plan that is only shown.
    """

    config: Config
    architecture: Architecture
    blocks: list[Block]
    recipe: Recipe
    stored: dict[str, torch.dtype]
    preflight: Preflight | None = None

    @property
    def available(self) -> int:
        """Bytes that are free where blocks run, or as ``preflight`` says."""
        return available_memory(self.device, self.preflight)[0]

    @property
    def linears(self) -> list[Linear]:
        """All linears in pruning order, including skipped ones."""
        return [linear for block in self.blocks for linear in block.linears]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of weights of each linear that is pruned."""
        return {linear.name: linear.size for linear in self.linears if linear.skipped is None}

    @property
    def prunable(self) -> int:
        """Number of weights of all linears that are pruned."""
        return sum(self.sizes.values())


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan(WeightsPlan):
    """Plan of a run that prunes block by block; made by :func:`prunekit.plan`.

    Attributes:
        axes: Parameter axes of the residual stream, if its coordinates are permuted.
        memory: Peak bytes of the busiest rank.
        work: Operations of each rank.
        traffic: Bytes that each rank sends, by purpose.
    """

    axes: Axes
    memory: Memory
    work: Work
    traffic: Mapping[str, int]

    @property
    def written_bytes(self) -> int:
        """Bytes of all tensors that are written, if the format is dense."""
        dense, quantization = self.checkpoint.nbytes, self.recipe.quantize
        if quantization is None:
            return dense
        pruned = (linear for linear in self.linears if linear.skipped is None)
        return quantized_bytes(dense, pruned, self.stored, quantization)

    def describe(self) -> RenderableType:
        """Return the plan as a table to print."""
        return Group(fact_table(_facts(self)), *linear_table(self))


def linear_table(plan: WeightsPlan) -> list[RenderableType]:
    """Return the lower part of a printed plan: linears and notes."""
    table = Table(title=f"{len(plan.sizes)} of {len(plan.linears)} linears are pruned")
    for header in ("layer", "outputs × inputs", "stored as"):
        table.add_column(header)
    for (path, shape, dtype, skipped), linears in _group_alike(plan).items():
        name = f"{path}  ×{len(linears)}" + ("  (dense)" if skipped else "")
        table.add_row(Text(name), shape, str(dtype).removeprefix("torch."))
    return ["", table, *note_lines(plan.notes[:20])]


def _facts(plan: Plan) -> dict[str, str]:
    """Return the rows of the printed plan, by their heads."""
    config, prune = plan.config, plan.config.prune
    rows = {
        "model": f"{config.model.path}  ({type(plan.model).__name__}, "
        f"{count(plan.parameters)} parameters, {len(plan.blocks)} blocks)",
        "prune": f"{prune.method.name}, {prune.pattern.name}, sparsity {prune.sparsity:g}, "
        f"allocation {prune.allocation.name}, propagation {prune.propagation}, steps {prune.steps}",
        "gathers": ", ".join(kind.name for kind in plan.recipe.needs) or "nothing",
        "runs": f"on {plan.device} in {str(plan.dtype).removeprefix('torch.')}",
        "ranks": f"{plan.ranks.size}: samples and rows are shared; memory is that of each",
        "output": f"{config.output.path}  ({size(plan.written_bytes)}{plan.joining_words})",
        "memory": _memory_text(plan.memory),
        "hidden states": _placement_text(plan),
        "operations": _operations_text(plan.work),
        "traffic": "each process sends "
        + ", ".join(f"{size(sent)} of {purpose}" for purpose, sent in plan.traffic.items()),
    }
    if config.model.part != "language":
        rows["prune"] += f", part {config.model.part}"
    if plan.recipe.quantize:
        rows["quantize"] = quantization_words(plan.recipe.quantize)
    rows |= data_words(config, plan.lengths)
    if not plan.ranks.is_distributed:
        del rows["ranks"], rows["traffic"]
    return rows


def _memory_text(memory: Memory) -> str:
    in_total = memory.waiting and not memory.separate_host
    parts = {
        "block": memory.block,
        **({"the next one": memory.prefetched} if memory.prefetched else {}),
        "statistics": memory.statistics,
        "solving": memory.solve,
        "results": memory.results,
        **({"the block being written": memory.waiting} if in_total else {}),
        **({"hidden states": memory.hidden} if memory.where == "device" else {}),
        "activations": memory.activations,
        **({"images": memory.images} if memory.images else {}),
    }
    listed = ", ".join(f"{name} {size(value)}" for name, value in parts.items())
    where = f" on the device and {size(memory.host)} of main memory" if memory.separate_host else ""
    vocabulary = f"embeddings or head {size(memory.vocabulary)}"
    return f"about {size(memory.total)}{where}: {listed}; {vocabulary}"


def _placement_text(plan: Plan) -> str:
    """Return where hidden states are kept, and why."""
    needs, (device, host) = plan.memory, available_memory(plan.device, plan.preflight)
    places = {
        "device": f"on {plan.device}",
        "host": "in main memory",
        "disk": f"in a file in {plan.config.output.path}",
    }
    if plan.config.calibration is None or not needs.hidden:
        return "none"
    placement = f"{size(needs.hidden)} {places[needs.where]}"
    if requested_placement(plan.config):
        return f"{placement}, as calibration.hidden asks"
    on_device = replace(needs, where="device")
    why = [
        f"with them {plan.device} would need {size(on_device.total)}, {size(device)} are free"
        if needs.where != "device"
        else "where blocks run; it has room"
    ]
    if needs.separate_host and needs.where == "disk":
        in_host = replace(needs, where="host")
        why.append(f"main memory {size(in_host.host)}, {size(host)} are free")
    return f"{placement}: {'; '.join(why)}"


def _operations_text(work: Work) -> str:
    most, mean = max(work.solve), sum(work.solve) / len(work.solve)
    imbalance = f" (at most {most / mean:.3f} of the mean)" if len(work.solve) > 1 and mean else ""
    return operations_text(
        {"forward": work.forward, "gathering": work.gather, f"solving{imbalance}": most}
    )


def _group_alike(plan: WeightsPlan) -> dict[tuple, list[Linear]]:
    """Group linears that differ only in their block number."""
    groups: dict[tuple, list[Linear]] = {}
    for linear in plan.linears:
        name = re.sub(r"\.\d+\.", ".*.", linear.name)
        key = (
            name,
            f"{linear.outputs} × {linear.inputs}",
            plan.stored[linear.name],
            linear.skipped,
        )
        groups.setdefault(key, []).append(linear)
    return groups
