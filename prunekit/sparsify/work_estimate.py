"""What a run takes of each rank, from shapes alone: bytes at its peak, and operations.

On a GPU the block, its statistics and the hidden states are on the device; the main memory holds
what is read from the files and what is about to be written. On a CPU all of it is main memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

import torch

from prunekit.distributed.ranks import Ranks
from prunekit.methods.refine import ITERATIONS
from prunekit.models.layout import Block, Linear
from prunekit.sparsify.recipe import Recipe
from prunekit.sparsify.row_sharding import row_shards
from prunekit.statistics import Gram, Statistic


@dataclass(frozen=True)
class CostInputs:
    """What the numbers depend on besides the model and the recipe.

    Attributes:
        device: Where blocks run.
        dtype: The type in which they run.
        stored: Name of each linear → the type in which its weight is written.
        samples: Calibration samples of the busiest rank, and tokens of each.
        ranks: How many share the run.
    """

    device: torch.device
    dtype: torch.dtype
    stored: dict[str, torch.dtype]
    samples: tuple[int, int]
    ranks: Ranks

    @property
    def tokens(self) -> int:
        """Calibration tokens of the busiest rank."""
        return self.samples[0] * self.samples[1]


def _rows(linear: Linear, recipe: Recipe, given: CostInputs) -> int:
    """Return how many rows of a linear the busiest rank prunes."""
    return max(_shares(linear, recipe, given.ranks))


def _shares(linear: Linear, recipe: Recipe, ranks: Ranks) -> list[int]:
    """Return how many rows of a linear each rank prunes."""
    parts = None
    if not recipe.blocks_independent:
        parts = row_shards(recipe.pattern, ranks, linear.outputs, linear.inputs)
    if not parts:
        return [linear.outputs] * ranks.size
    return [part.stop - part.start for part in parts]


@dataclass(frozen=True)
class Work:
    """Floating-point operations of each rank over a run; a multiplication and an addition are two.

    Attributes:
        forward: Of blocks, on the busiest rank.
        gather: Of statistics, on the busiest rank.
        solve: Of pruning, rank by rank.
    """

    forward: int
    gather: int
    solve: tuple[int, ...]


def work(blocks: Sequence[Block], recipe: Recipe, given: CostInputs) -> Work:
    """Return the operations of each rank."""
    tokens, (_, length) = given.tokens, given.samples
    weights = sum(linear.size for block in blocks for linear in block.linears)
    # Scores and sums of attention: two products over half of the pairs of tokens.
    widths = sum(max(linear.inputs for linear in block.stages[0]) for block in blocks)
    once = 2 * tokens * weights + 2 * tokens * length * widths
    gathered = sum(
        tokens * kind.flops(stage[0].inputs) // (1 if stage[0].expert else kind.sample_stride)
        for block in blocks
        for stage in block.pruned_stages
        for kind in recipe.needs
    )
    orders = bool(recipe.permute) + (recipe.permute == "residual")
    forwards = passes(recipe) * (1 + recipe.runs_dense_model) + orders
    return Work(
        forward=int(once * forwards) if recipe.needs else 0,
        gather=gathered * recipe.steps,
        solve=_solves(blocks, recipe, given),
    )


def passes(recipe: Recipe) -> float:
    """Return how often a block runs, as a whole: by stage its neurons run twice."""
    return 1.5 * recipe.steps if recipe.propagation == "stage" else recipe.steps + 1


def row_flops(recipe: Recipe, outputs: int, inputs: int) -> int:
    """Return the operations of so many rows: method, refining, and measuring the error."""
    products = 2 * (ITERATIONS + 1) if recipe.refine else 0
    products += 2 * any(issubclass(kind, Gram) for kind in recipe.needs)
    return recipe.method.flops(outputs, inputs) + products * outputs * inputs**2


def _solves(blocks: Sequence[Block], recipe: Recipe, given: CostInputs) -> tuple[int, ...]:
    ranks = Ranks(0, given.ranks.size)
    done = [0] * ranks.size
    for number, block in enumerate(blocks):
        stages = block.pruned_stages
        inverse = [recipe.method.flops_of_inverse(stage[0].inputs) for stage in stages]
        if recipe.blocks_independent:
            rows = sum(row_flops(recipe, each.outputs, each.inputs) for each in block.pruned)
            whole = sum(map(mul, inverse, (_inverses(stage, recipe) for stage in stages)))
            done[number % ranks.size] += (whole + rows) * recipe.steps
            continue
        for _ in range(recipe.steps):
            for makers, flops in zip(_makers(stages, recipe, ranks), inverse, strict=True):
                for rank in makers:
                    done[rank] += flops
        for linear in block.pruned:
            for rank, rows in enumerate(_shares(linear, recipe, ranks)):
                done[rank] += row_flops(recipe, rows, linear.inputs) * recipe.steps
    return tuple(done)


def _inverses(stage: Sequence[Linear], recipe: Recipe) -> int:
    return recipe.method.inverses([linear.outputs for linear in stage])


def _makers(
    stages: Sequence[Sequence[Linear]], recipe: Recipe, ranks: Ranks
) -> list[Sequence[int]]:
    """Return which rank makes each inverse of the Gram matrix of each stage."""
    works = [stage[0].inputs ** 3 for stage in stages]
    counts = [_inverses(stage, recipe) for stage in stages]
    if not recipe.method.shared_inverses:
        return [[*range(ranks.size)] * count for count in counts]
    if recipe.propagation == "block" and all(count == 1 for count in counts):
        return [[owner] for owner in ranks.assign_each(works)]
    return [ranks.assign_rounds(work, count) for work, count in zip(works, counts, strict=True)]


def traffic(blocks: Sequence[Block], recipe: Recipe, given: CostInputs) -> dict[str, int]:
    """Return the bytes that each rank sends over a run, by what they are for.

    Counts for thresholds and errors, and what experts read anew, come on top.
    """
    sent = dict.fromkeys(("statistics", "inverses", "rows"), 0)
    others, ranks = given.ranks.size - 1, given.ranks.size
    for block in blocks:
        for stage in block.pruned_stages:
            inputs = stage[0].inputs
            parts = [part for kind in recipe.needs for part in _parts(kind, inputs)]
            sent["statistics"] += sum(2 * part * others // ranks for part in parts)
            if recipe.blocks_independent:
                continue
            if recipe.method.shared_inverses:
                one = sum(part * others // ranks for part in _parts(Gram, inputs))
                sent["inverses"] += one * _inverses(stage, recipe)
            for linear in stage:
                if row_shards(recipe.pattern, given.ranks, linear.outputs, linear.inputs):
                    rows, size = _rows(linear, recipe, given), given.stored[linear.name].itemsize
                    sent["rows"] += others * rows * linear.inputs * size
    return {what: recipe.steps * nbytes for what, nbytes in sent.items()}


def _parts(kind: type[Statistic], inputs: int) -> list[int]:
    """Return the bytes of each part that is sent of a statistic; of an inverse, as of a Gram."""
    return [part.nbytes for part in kind(inputs, "meta").parts()]
