"""The settings by which blocks are pruned."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from prunekit.allocations.schedules import SCHEDULES
from prunekit.config.prune_table import Permute, Prune, Recover
from prunekit.errors import ConfigError
from prunekit.methods import Method, Propagation
from prunekit.methods.quantize import Quantization
from prunekit.methods.refine import Refine
from prunekit.methods.target import Target
from prunekit.models.layout import Block
from prunekit.models.sequential.pipeline import OutputsRead
from prunekit.patterns import Pattern
from prunekit.statistics import (
    ColumnEnergy,
    CrossGram,
    Gram,
    SampledGram,
    Starved,
    Statistic,
    minimal_union,
)


@dataclass(frozen=True)
class ExpertCoverage:
    """Policy for experts with too few calibration tokens.

    Attributes:
        below: Fewer tokens than this are too few.
        policy: How the statistics of such an expert are replaced.
    """

    below: int = 1
    policy: Starved = "all-tokens"


@dataclass(frozen=True)
class Recipe:
    """The settings by which blocks are pruned, from the table ``[prune]``.

    Attributes:
        method: Chooses and changes weights.
        pattern: Which zeros are allowed.
        propagation: Model that a stage is calibrated in. "stage": everything before it is pruned.
            "block": all blocks before are pruned, its own block is dense. "none": the dense model.
        refine: How kept weights are improved after the method, or None.
        target: Which output kept weights approximate.
        steps: Number of pruning steps; statistics are gathered anew before each.
        schedule: Sparsity over the steps.
        initial_sparsity: Sparsity at which the schedule starts.
        recover: How a pruned block, or each of its linears, is corrected; None for not at all.
        recover_rank: Rank of the adapters of recover = "lowrank".
        permute: Whether channels are reordered first (``permute_channels``); "residual": those of
            the residual stream too (``permute_residual``).
        measure_error: Report relative errors; gathers a sampled Gram matrix if the method needs
            none.
        yields_results: Whether linears are measured and yielded; a training needs no results.
        coverage: Policy for experts with too few tokens.
        quantize: How the weights that are kept are rounded in the last step, or None.
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
    yields_results: bool = True
    coverage: ExpertCoverage = field(default_factory=ExpertCoverage)
    quantize: Quantization | None = None

    def check(self, blocks: Sequence[Block]) -> None:
        """Refuse settings that do not fit the blocks.

        Raises:
            ConfigError: recover or permute together with propagation "none", which prunes blocks
                independently; or recover with experts, whose tokens differ from the dense model's.
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
        """Return the recipe of a table ``[prune]``; ``calibrated``: there is calibration text."""
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
            coverage=ExpertCoverage(prune.starved_below, prune.starved),
        )

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """Statistics gathered for each stage; none without need for calibration text."""
        compensates = self.quantize and self.quantize.compensates
        solves = [Gram] if self.refine or self.recover == "lowrank" or compensates else []
        aims = [Gram, CrossGram] if self.target == "dense" else []
        orders = [ColumnEnergy] if self.permute else []
        found = minimal_union([*self.method.needs, *solves, *aims, *orders])
        if not self.measure_error or Gram in found:
            return found
        # Column energies cover every token, so a NaN anywhere is detected.
        return minimal_union([*found, ColumnEnergy, SampledGram])

    @property
    def outputs_read(self) -> OutputsRead:
        """Blocks whose output is read while the model is pruned."""
        return "by-next-block" if self.needs or self.runs_dense_model else "none"

    @property
    def blocks_independent(self) -> bool:
        """Whether no block depends on another one being pruned."""
        return self.propagation == "none" or not (self.needs or self.runs_dense_model)

    @property
    def runs_dense_model(self) -> bool:
        """Whether the dense model runs beside the pruned one."""
        return self.target == "dense" or self.recover == "block"

    def quantizes(self, step: int) -> Quantization | None:
        """Return how kept weights are rounded: in the last step alone."""
        return self.quantize if step == self.steps else None

    def sparsity(self, step: int, final: float) -> float:
        """Return the sparsity to reach in a step; the last reaches ``final``.

        ``step``: 1..steps.
        """
        schedule = SCHEDULES[self.schedule if self.steps > 1 else "one-shot"]
        return schedule(step, self.steps, final, min(self.initial_sparsity, final))
