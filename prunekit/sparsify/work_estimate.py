"""Estimate the operations and the traffic of each rank from shapes alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from operator import mul

import torch

from prunekit.distributed.ranks import Ranks
from prunekit.methods.quantize import PASSES
from prunekit.methods.refine import ITERATIONS
from prunekit.models.layout import Block, Linear
from prunekit.sparsify.recipe import Recipe
from prunekit.sparsify.row_sharding import row_shards
from prunekit.statistics import Gram, Statistic

QUANTIZING = 1 + 3 * PASSES
"""Operations of rounding by the Gram matrix, in outputs × inputs²: half a product for the sweep,
and one and a half, the residual included, for each pass after it."""


@dataclass(frozen=True)
class CostInputs:
    """Inputs of the estimates, besides the model and the recipe.

    Attributes:
        device: Device that runs blocks.
        dtype: Dtype in which they run.
        stored: Name of each linear → dtype in which its weight is written.
        samples: Calibration samples of the busiest rank, and tokens of each.
        ranks: The processes that share the run.
        packs: Weights are packed before they are written.
    """

    device: torch.device
    dtype: torch.dtype
    stored: dict[str, torch.dtype]
    samples: tuple[int, int]
    ranks: Ranks
    packs: bool = False

    @property
    def tokens(self) -> int:
        """Calibration tokens of the busiest rank."""
        return self.samples[0] * self.samples[1]


def max_rows(linear: Linear, recipe: Recipe, costs: CostInputs) -> int:
    """Return the number of rows that the busiest rank prunes.

    Args:
        linear: The linear.
        recipe: The settings.
        costs: Sizes that the estimate depends on.
    """
    return max(_rows_of_ranks(linear, recipe, costs.ranks))


def _rows_of_ranks(linear: Linear, recipe: Recipe, ranks: Ranks) -> list[int]:
    """Return the number of rows of a linear that each rank prunes."""
    parts = None
    if not recipe.blocks_independent:
        parts = row_shards(recipe.pattern, ranks, linear.outputs, linear.inputs)
    if not parts:
        return [linear.outputs] * ranks.size
    return [part.stop - part.start for part in parts]


@dataclass(frozen=True)
class Work:
    """Floating-point operations over a run; a multiply-add counts as two.

    Attributes:
        forward: Forwards of blocks, on the busiest rank.
        gather: Statistics, on the busiest rank.
        solve: Pruning, by rank.
    """

    forward: int
    gather: int
    solve: tuple[int, ...]


def estimate_work(blocks: Sequence[Block], recipe: Recipe, costs: CostInputs) -> Work:
    """Return the operations of each rank.

    Args:
        blocks: All blocks and their linears.
        recipe: The settings.
        costs: Sizes that the estimate depends on.
    """
    tokens, (_, length) = costs.tokens, costs.samples
    weights = sum(linear.size for block in blocks for linear in block.linears)
    # Attention: two products over half of all pairs of tokens.
    widths = sum(
        max(linear.inputs for linear in block.stages[0]) for block in blocks if block.stages
    )
    once = 2 * tokens * weights + 2 * tokens * length * widths
    gathered = sum(
        tokens * kind.flops(stage[0].inputs) // (1 if stage[0].expert else kind.sample_stride)
        for block in blocks
        for stage in block.pruned_stages
        for kind in recipe.needs
    )
    orders = bool(recipe.permute) + (recipe.permute == "residual")
    forwards = block_runs(recipe) * (1 + recipe.runs_dense_model) + orders
    return Work(
        forward=int(once * forwards) if recipe.needs else 0,
        gather=gathered * recipe.steps,
        solve=_solve_flops(blocks, recipe, costs),
    )


def block_runs(recipe: Recipe) -> float:
    """Return how often a block runs; by stage, its feed-forward runs twice."""
    return 1.5 * recipe.steps if recipe.propagation == "stage" else recipe.steps + 1


def row_flops(recipe: Recipe, outputs: int, inputs: int) -> int:
    """Return the operations of pruning, refining and measuring rows of a linear.

    Args:
        recipe: The settings.
        outputs: Number of rows.
        inputs: Number of columns.
    """
    products = 2 * (ITERATIONS + 1) if recipe.refine else 0
    products += QUANTIZING * bool(recipe.quantize and recipe.quantize.compensates)
    products += 2 * any(issubclass(kind, Gram) for kind in recipe.needs)
    return recipe.method.flops(outputs, inputs) + products * outputs * inputs**2


def _solve_flops(blocks: Sequence[Block], recipe: Recipe, costs: CostInputs) -> tuple[int, ...]:
    ranks = Ranks(0, costs.ranks.size)
    done = [0] * ranks.size
    for number, block in enumerate(blocks):
        stages = block.pruned_stages
        inverse = [recipe.method.flops_of_inverse(stage[0].inputs) for stage in stages]
        if recipe.blocks_independent:
            rows = sum(row_flops(recipe, each.outputs, each.inputs) for each in block.pruned)
            whole = sum(map(mul, inverse, (inverse_count(stage, recipe) for stage in stages)))
            done[number % ranks.size] += (whole + rows) * recipe.steps
            continue
        for _ in range(recipe.steps):
            for owners, flops in zip(_inverse_owners(stages, recipe, ranks), inverse, strict=True):
                for rank in owners:
                    done[rank] += flops
        for linear in block.pruned:
            for rank, rows in enumerate(_rows_of_ranks(linear, recipe, ranks)):
                done[rank] += row_flops(recipe, rows, linear.inputs) * recipe.steps
    return tuple(done)


def inverse_count(stage: Sequence[Linear], recipe: Recipe) -> int:
    """Return the number of inverse Gram matrices needed for a stage."""
    return recipe.method.inverses([linear.outputs for linear in stage])


def _inverse_owners(
    stages: Sequence[Sequence[Linear]], recipe: Recipe, ranks: Ranks
) -> list[Sequence[int]]:
    """Return the rank of each inverse Gram matrix, for each stage."""
    works = [stage[0].inputs ** 3 for stage in stages]
    counts = [inverse_count(stage, recipe) for stage in stages]
    if not recipe.method.shared_inverses:
        return [[*range(ranks.size)] * count for count in counts]
    if recipe.propagation == "block" and all(count == 1 for count in counts):
        return [[owner] for owner in ranks.assign_each(works)]
    return [ranks.assign_rounds(work, count) for work, count in zip(works, counts, strict=True)]


def estimate_traffic(blocks: Sequence[Block], recipe: Recipe, costs: CostInputs) -> dict[str, int]:
    """Return the bytes that each rank sends over a run, by purpose.

    Sums for thresholds and errors, statistics of scores, and those that experts gather anew are not
    included.

    Args:
        blocks: All blocks and their linears.
        recipe: The settings.
        costs: Sizes that the estimate depends on.
    """
    sent = dict.fromkeys(("statistics", "inverses", "rows"), 0)
    others, ranks = costs.ranks.size - 1, costs.ranks.size
    for block in blocks:
        for stage in block.pruned_stages:
            inputs = stage[0].inputs
            parts = [part for kind in recipe.needs for part in _parts(kind, inputs)]
            sent["statistics"] += sum(2 * part * others // ranks for part in parts)
            if recipe.blocks_independent:
                continue
            if recipe.method.shared_inverses:
                one = sum(part * others // ranks for part in _parts(Gram, inputs))
                sent["inverses"] += one * inverse_count(stage, recipe)
            for linear in stage:
                if row_shards(recipe.pattern, costs.ranks, linear.outputs, linear.inputs):
                    rows, size = max_rows(linear, recipe, costs), costs.stored[linear.name].itemsize
                    sent["rows"] += others * rows * linear.inputs * size
    return {purpose: recipe.steps * nbytes for purpose, nbytes in sent.items()}


@cache
def _parts(kind: type[Statistic], inputs: int) -> list[int]:
    """Return the bytes of each part of a statistic that is sent."""
    return [part.nbytes for part in kind(inputs, "meta").parts()]
