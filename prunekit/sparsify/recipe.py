"""TODO-DOC prunekit/sparsify/recipe.py (out of prunekit/gathering.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from prunekit.allocations.schedules import SCHEDULES
from prunekit.config.prune_table import Permute, Prune, Recover
from prunekit.errors import ConfigError
from prunekit.methods import Method, Propagation
from prunekit.methods.refine import Refine
from prunekit.methods.target import Target
from prunekit.models.layout import Block
from prunekit.patterns import Pattern
from prunekit.statistics import (
    ColumnEnergy,
    CrossGram,
    Gram,
    SampledGram,
    Starved,
    Statistic,
    union,
)


@dataclass(frozen=True)
class ExpertCoverage:
    """An expert is starved ``below`` so many tokens; what is done then."""

    below: int = 1
    policy: Starved = "all-tokens"


@dataclass(frozen=True)
class Recipe:
    """How blocks are pruned.

    Attributes:
        method: Chooses and changes weights.
        pattern: Which zeros are allowed.
        propagation: "stage": each stage sees what the pruned stages before it give. "block": all
            see what the dense block gives, from one forward of its own. "none": all see what they
            read in the dense model.
        refine: What is done to the weights that stay.
        target: What they aim at.
        steps: Prune in so many steps, gathering anew before each.
        schedule: Sparsity over the steps.
        initial_sparsity: Where the schedule starts.
        recover: What is done to a block once it is pruned, or to each of its linears.
        recover_rank: Of the adapters, where that is done.
        permute: Channels are put in a better order first, by :mod:`prunekit.sparsify.permute_channels`; also
            those of the residual stream, by :mod:`prunekit.sparsify.permute_residual`.
        measure_error: Gather the Gram matrix of a sample if the method needs none, for the relative
            error.
        hunger: What is done with experts to which few tokens are routed.
    """

    method: Method
    pattern: Pattern
    propagation: Propagation = "stage"
    refine: Refine | None = None
    target: Target = "layer"
    steps: int = 1
    schedule: str = "cubic"
    initial_sparsity: float = 0.0
    recover: Recover | None = None
    recover_rank: int = 0
    permute: Permute = False
    measure_error: bool = True
    hunger: ExpertCoverage = field(default_factory=ExpertCoverage)

    def check(self, blocks: Sequence[Block]) -> None:
        """Refuse to recover experts, whose tokens are not those of the dense model.

        And to change blocks that are pruned apart otherwise than by pruning.

        Raises:
            ConfigError: So it is asked.
        """
        if self.propagation == "none" and (self.recover or self.permute):
            other = "recover" if self.recover else "permute"
            raise ConfigError(f'propagation = "none" does not go with {other} yet.')
        experts = [linear for block in blocks for linear in block.pruned if linear.expert]
        if self.recover and experts:
            raise ConfigError(
                f'recover = "{self.recover}": {experts[0].name} is of an expert, which cannot be '
                "recovered yet. Leave it out."
            )

    @classmethod
    def of(cls, prune: Prune, *, calibrated: bool) -> Self:
        """Return what the section ``[prune]`` of a config says."""
        return cls(
            method=prune.method,
            pattern=prune.pattern,
            propagation=prune.propagation,
            refine=prune.refine,
            target=prune.target,
            steps=prune.steps,
            schedule=prune.schedule,
            initial_sparsity=prune.initial_sparsity,
            recover=prune.recover,
            recover_rank=prune.recover_rank,
            permute=prune.permute,
            measure_error=prune.measure_error and calibrated,
            hunger=ExpertCoverage(prune.starved_below, prune.starved),
        )

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """What is gathered for each stage."""
        solves = [Gram] if self.refine or self.recover == "lowrank" else []
        aims = [Gram, CrossGram] if self.target == "dense" else []
        orders = [ColumnEnergy] if self.permute else []
        found = union([*self.method.needs, *solves, *aims, *orders])
        if not self.measure_error or Gram in found:
            return found
        # Column energies see every token, so that none is NaN unseen.
        return union([*found, ColumnEnergy, SampledGram])

    @property
    def blocks_independent(self) -> bool:
        """Whether no block has to wait for another one to be pruned."""
        return self.propagation == "none" or not (self.needs or self.runs_dense_model)

    @property
    def runs_dense_model(self) -> bool:
        """Whether the dense model is walked through beside the pruned one."""
        return self.target == "dense" or self.recover == "block"

    def sparsity(self, step: int, final: float) -> float:
        """Return the sparsity to reach in ``step`` of 1..steps; the last is always ``final``."""
        schedule = SCHEDULES[self.schedule if self.steps > 1 else "one-shot"]
        return schedule(step, self.steps, final, min(self.initial_sparsity, final))
