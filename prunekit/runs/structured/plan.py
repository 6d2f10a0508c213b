"""Plan of a run that removes whole units: heads, neurons, coordinates, blocks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from typing_extensions import override

from prunekit.config.run_config import StructuredConfig
from prunekit.formatting import count, percent, size
from prunekit.models.orientation import weight_matrix
from prunekit.models.sequential.hidden_states import Where
from prunekit.models.sequential.pipeline import BATCH_TOKENS, batch_tokens
from prunekit.models.units.base import UnitGroup
from prunekit.models.units.heads_neurons import LinearUnitGroup
from prunekit.models.units.kinds import Kind
from prunekit.runs.distillation import distillation_words
from prunekit.runs.plan_base import PlanBase, fact_table, note_lines
from prunekit.runs.preflight import Preflight, available_memory, requested_placement
from prunekit.runs.sharded_training import held_words
from prunekit.runs.structured.blockwise_memory import Place, blockwise_memory, by_place, placed
from prunekit.runs.structured.unit_scores import TRUTH_TOKENS
from prunekit.runs.structured.work_estimate import CostInputs, UnitWork, estimate_unit_work
from prunekit.runs.texts import data_words
from prunekit.runs.time_estimate import operations_text
from prunekit.runs.training import (
    schedule_words,
    trained_adapter,
    training_words,
)
from prunekit.runs.training_memory import (
    distillation_memory,
    saved_state_words,
    training_activations,
    training_state_bytes,
)
from prunekit.structured.parameter_budget import counted_parameters


@dataclass(frozen=True, kw_only=True, repr=False)
class StructuredPlan(PlanBase):
    """Plan of a run that removes units; made by :func:`plan`.

    Attributes:
        config: The user's config.
        places: Groups of units of each kind that is removed.
        stored: Name of each parameter → its name in the checkpoint.
        fixed: Blocks that cannot be removed, by name of their list.
        preflight: Memory of another machine, for a plan that is only shown.
    """

    config: StructuredConfig
    groups: dict[Kind, Sequence[UnitGroup]]
    stored: dict[str, str]
    fixed: dict[str, list[int]] = field(default_factory=dict)
    preflight: Preflight | None = None

    @property
    def prunable(self) -> int:
        """Total size of the parameters that hold units of the removed kinds."""
        return owned_parameters(group for groups in self.groups.values() for group in groups)

    @property
    def counted_parameters(self) -> int:
        """Number of parameters that a budget counts."""
        return sum(
            each.numel() for each in counted_parameters(self.model, self.config.prune.parameters_of)
        )

    @property
    def by_block(self) -> bool:
        """Whether units are ranked with one block of weights in memory.

        Units that are removed while the model is trained are ranked in the whole model.
        """
        return self.config.apt is None and self.config.prune.gradual is None

    @cached_property
    @override
    def largest_shard(self) -> int:
        """Bytes of the largest shard: a block's, or the whole model's."""
        return super().largest_shard if self.by_block else self.checkpoint.nbytes

    @cached_property
    def where(self) -> Where:
        """Where the hidden states of all samples are stored."""
        available = available_memory(self.device, self.preflight)
        requested = requested_placement(self.config)
        return placed(self._phases[0], requested, self.device, available)

    @property
    def place(self) -> Place:
        """Estimated peak bytes on the device, in main memory and on disk."""
        if not self.by_block:
            return Place(sum(self.memory.values()), 0, 0)
        places = [by_place(each, self.where, self.device) for each in self._phases]
        return Place(*map(max, zip(*places, strict=True)))

    @property
    def memory(self) -> dict[str, int]:
        """Estimated peak bytes by use, in the phase that needs most."""
        if not self.by_block:
            return self._phases[0]
        return max(self._phases, key=lambda each: by_place(each, self.where, self.device).device)

    @cached_property
    def _phases(self) -> list[dict[str, int]]:
        """Estimated bytes by use: of ranking, of training after it."""
        if not self.by_block:
            return [self._whole_model_memory]
        ranking = blockwise_memory(self._costs, self.dtype, self.device)
        if self.config.training is None:
            return [ranking]
        if self.config.prune.compensate != "none":  # the model in memory takes the weights
            ranking["model"] = self.parameters * torch.float32.itemsize
        return [ranking, self._training_memory | {"activations": training_activations(self)}]

    @property
    def _training_memory(self) -> dict[str, int]:
        """Estimated bytes of a training by use, but for activations."""
        model = self.parameters * self.dtype.itemsize
        parts = {"model": model, "training": training_state_bytes(self) - model}
        gated = self.config.prune.gradual is not None or self.config.apt is not None
        return parts | distillation_memory(self, gated=gated)

    @cached_property
    def work(self) -> UnitWork:
        """Estimated operations of ranking and compensating, on the busiest rank."""
        return estimate_unit_work(self._costs)

    @property
    def _costs(self) -> CostInputs:
        config = self.config.calibration
        count, length = (config.samples, self.lengths[0]) if config else (0, 1)
        return CostInputs(
            stacks=self.stacks,
            groups=self.groups,
            prune=self.config.prune,
            samples=(-(-count // self.ranks.size), length),
            few=min(count, max(1, TRUTH_TOKENS // length)),
            batch=batch_tokens(self.device),
            by_block=self.by_block,
        )

    @property
    def _whole_model_memory(self) -> dict[str, int]:
        """Estimated peak bytes by use with the whole model in memory."""
        needs_loss = self.config.training is not None or self.config.prune.truth
        needs_loss |= any(part.needs_loss for part in self.config.prune.method.components)
        widths = [self.stacks[0].features] + [
            weight_matrix(group.reader.linear).shape[1]
            for groups in self.groups.values()
            for group in groups
            if isinstance(group, LinearUnitGroup)
        ]
        config = self.config.calibration
        tokens = min(BATCH_TOKENS["cpu"], config.samples * self.lengths[0]) if config else 0
        has_head = self.model.get_output_embeddings() is not None
        vocabulary = getattr(self.model.config, "vocab_size", 0) if has_head else 0
        # A gradient needs the activations of every block, and the logits three times.
        vectors = len(self.stacks[0].blocks) * 12 if needs_loss else 8
        activations = 4 * tokens * (vectors * max(widths) + 3 * needs_loss * vocabulary)
        if self.config.training:
            activations = max(activations, training_activations(self))
        parts = {
            "model": self.parameters * self.dtype.itemsize,
            # A ranker that needs the loss also gathers statistics of outputs of linears.
            "statistics": 4 * sum(width**2 for width in widths)
            + 8 * needs_loss * len(widths) * widths[0] ** 2
            + 3 * 8 * max(widths) ** 2,
            "activations": activations,
        }
        return parts | (self._training_memory if self.config.training else {})

    def describe(self) -> RenderableType:
        """Return the plan as a table to print."""
        return _describe(self)


def _memory_text(plan: StructuredPlan) -> str:
    listed = ", ".join(f"{name} {size(value)}" for name, value in plan.memory.items() if value)
    apart = {"main memory": plan.place.host, "a file beside the checkpoint": plan.place.disk}
    moved = [f"{size(nbytes)} of it in {where}" for where, nbytes in apart.items() if nbytes]
    return f"about {listed}" + "".join(f"; {each}" for each in moved)


def _operations_text(plan: StructuredPlan) -> str:
    work = plan.work
    parts = {"forward": work.forward, "backward": work.backward}
    parts |= {"gathering": work.gather, "solving": work.solve}
    return operations_text(parts) + ("; training apart" if plan.config.training else "")


def owned_parameters(groups: Iterable[UnitGroup]) -> int:
    """Return the total size of the parameters that hold these units."""
    shares = [share for group in groups for share in group.parameter_axes]
    return sum({id(share.parameter): share.parameter.numel() for share in shares}.values())


def _describe(plan: StructuredPlan) -> RenderableType:
    table = Table("units", "layers", "in a layer", "parameters of one", "of the model")
    for kind, groups in plan.groups.items():
        table.add_row(
            kind,
            str(len(groups)),
            ", ".join(map(str, sorted({group.units for group in groups}))),
            ", ".join(map(count, sorted({group.parameters_per_unit for group in groups}))),
            percent(owned_parameters(groups) / plan.parameters),
        )
    return Group(fact_table(_facts(plan)), "", table, *note_lines(plan.notes))


def _facts(plan: StructuredPlan) -> dict[str, str]:
    """Return the rows of the printed plan, by their heads."""
    config, prune = plan.config, plan.config.prune
    goal = (
        f"{percent(prune.sparsity)} of {' and '.join(prune.pattern)}"
        if prune.sparsity is not None
        else f"{' and '.join(prune.pattern)}, {percent(prune.parameters)} of the parameters"
        f"{' of the blocks' * (prune.parameters_of == 'blocks')} stay"
    )
    ranking = f"by {prune.method.name}, compared {'in each layer' * (prune.scope == 'layer')}"
    if prune.scope == "global":
        ranking += "across layers"
    rows = {
        "model": f"{config.model.path}  ({type(plan.model).__name__}, "
        f"{count(plan.parameters)} parameters, {plan.block_count} blocks)",
        "prune": f"{goal}, {ranking}, steps "
        f"{prune.steps}, compensate {prune.compensate}, uniform {str(prune.uniform).lower()}, "
        f"rounded up to {prune.round_to}",
        "runs": f"on {plan.device} in {str(plan.dtype).removeprefix('torch.')}",
        "output": f"{config.output.path}  (at most {size(plan.checkpoint.nbytes)}"
        f"{plan.joining_words}{saved_state_words(plan)})",
        "memory": _memory_text(plan),
        "operations": _operations_text(plan),
    }
    if plan.ranks.is_distributed:
        held = ["a block at a time"] if plan.by_block else []
        held += [f"{held_words(plan)} while it trains"] if config.training else []
        rows["ranks"] = f"{plan.ranks.size}: samples are shared; each has {', then '.join(held)}"
    rows |= data_words(config, plan.lengths)
    if prune.truth:
        units = sum(group.units for groups in plan.groups.values() for group in groups)
        rows["truth"] = f"{units} runs more of the model, one for each unit"
    if config.training:
        adapter = trained_adapter(config, plan.model)
        rows["train"] = training_words(config.training, adapter)
        if config.distill:
            last = config.apt.end if config.apt else config.training.steps
            rows["distill"] = distillation_words(config.distill, last)
        if prune.gradual:
            rows["prune"] += f"; {schedule_words(prune)}"
    return rows
