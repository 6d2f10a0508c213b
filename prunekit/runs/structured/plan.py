"""TODO-DOC prunekit/runs/structured/plan.py (out of prunekit/shrink_planning.py)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunekit.checkpoint.reader import Checkpoint
from prunekit.config.run_config import StructuredConfig
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.formatting import count, percent, size
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.pipeline import BATCH_TOKENS
from prunekit.models.units.base import UnitGroup
from prunekit.models.units.heads_neurons import Site, matrix
from prunekit.models.units.kinds import Kind


@dataclass(frozen=True)
class StructuredPlan:
    """What a run will take out; made by :func:`plan`.

    Attributes:
        config: What the user wrote.
        checkpoint: The model's files.
        model: The model without weights.
        tokenizer: The tokenizer beside the checkpoint.
        stacks: Runners of its stacks.
        places: Where its units are, of each kind that goes.
        device: Where the model runs.
        dtype: The type in which it runs.
        stored: Name of each parameter → its name in the checkpoint.
        lengths: Tokens of a calibration sample and of an evaluation window, after the cap.
        notes: What the user should know.
        ranks: The processes that share the run.
    """

    config: StructuredConfig
    checkpoint: Checkpoint
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stacks: list[StackRunner]
    places: dict[Kind, Sequence[UnitGroup]]
    device: torch.device
    dtype: torch.dtype
    stored: dict[str, str]
    lengths: tuple[int, int]
    notes: tuple[str, ...]
    ranks: Ranks = SINGLE

    @property
    def parameters(self) -> int:
        """Parameters of the model; tied ones count once."""
        return sum(
            math.prod(self.checkpoint.entries[name].shape) for name in set(self.stored.values())
        )

    @property
    def prunable(self) -> int:
        """Parameters that hold something of a unit of the kinds that go."""
        return held(place for found in self.places.values() for place in found)

    @cached_property
    def memory(self) -> dict[str, int]:
        """Peak bytes by what they are for: the whole model is in memory while it is ranked."""
        asks = self.config.train is not None or self.config.prune.truth
        asks |= any(part.needs_loss for part in self.config.prune.method.parts)
        model = self.parameters * self.dtype.itemsize
        widths = [self.stacks[0].features] + [
            matrix(place.reader.linear).shape[1]
            for found in self.places.values()
            for place in found
            if isinstance(place, Site)
        ]
        config = self.config.calibration
        tokens = min(BATCH_TOKENS["cpu"], config.samples * self.lengths[0]) if config else 0
        words = getattr(self.model.config, "vocab_size", 0)
        # For the gradient every block's activations are held, and the logits thrice.
        kept = len(self.stacks[0].blocks) * 12 if asks else 8
        activations = 4 * tokens * (kept * max(widths) + 3 * asks * words)
        parts = {
            "model": model,
            # Of a ranker that asks for the loss also of what linears give.
            "statistics": 4 * sum(width**2 for width in widths)
            + 8 * asks * len(widths) * widths[0] ** 2
            + 3 * 8 * max(widths) ** 2,
            "activations": activations,
        }
        if self.config.train:  # in float32: weights, gradients, two moments, the best so far
            parts["training"] = 5 * 4 * self.parameters - model
        return parts

    def describe(self) -> RenderableType:
        """Return the plan as a table to print."""
        return _describe(self)


def held(found: Iterable[UnitGroup]) -> int:
    """Return how many parameters hold something of the units of these places."""
    shares = [share for place in found for share in place.shares]
    return sum({id(share.parameter): share.parameter.numel() for share in shares}.values())


def _describe(made: StructuredPlan) -> RenderableType:
    config, prune = made.config, made.config.prune
    facts = Table.grid(padding=(0, 2))
    asked = (
        f"{percent(prune.sparsity)} of {' and '.join(prune.pattern)}"
        if prune.sparsity is not None
        else f"{' and '.join(prune.pattern)}, {percent(prune.parameters)} of the parameters stay"
    )
    ranked = f"by {prune.method.name}, compared {'in each layer' * (prune.scope == 'layer')}"
    if prune.scope == "global":
        ranked += "across layers"
    rows = {
        "model": f"{config.model.path}  ({type(made.model).__name__}, "
        f"{count(made.parameters)} parameters, {sum(len(s.blocks) for s in made.stacks)} blocks)",
        "prune": f"{asked}, {ranked}, steps "
        f"{prune.steps}, compensate {prune.compensate}, uniform {str(prune.uniform).lower()}, "
        f"rounded up to {prune.round_to}",
        "runs": f"on {made.device} in {str(made.dtype).removeprefix('torch.')}",
        "output": f"{config.output.path}  (at most {size(made.checkpoint.nbytes)})",
        "memory": "about "
        + ", ".join(f"{name} {size(value)}" for name, value in made.memory.items()),
    }
    if made.ranks.is_distributed:
        rows["ranks"] = f"{made.ranks.size}: samples are shared; each has the whole model"
    if config.calibration:
        rows["calibration"] = (
            f"{config.calibration.samples} samples of {made.lengths[0]} tokens, seed "
            f"{config.calibration.seed}"
        )
    if prune.truth:
        units = sum(place.units for found in made.places.values() for place in found)
        rows["truth"] = f"{units} runs more of the model, one for each unit"
    if config.train:
        rows["train"] = (
            f"{config.train.steps} steps of {config.train.batch} samples at most, held out "
            f"{config.train.held_out} samples"
        )
    for key, value in rows.items():
        facts.add_row(f"[bold]{key}", value)
    table = Table("units", "layers", "in a layer", "parameters of one", "of the model")
    for kind, found in made.places.items():
        table.add_row(
            kind,
            str(len(found)),
            ", ".join(map(str, sorted({place.units for place in found}))),
            ", ".join(map(count, sorted({place.parameters for place in found}))),
            percent(held(found) / made.parameters),
        )
    return Group(facts, "", table, *[f"[yellow]note[/] {note}" for note in made.notes])
