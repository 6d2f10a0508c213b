"""What a run takes of each rank, from shapes alone: bytes at its peak, and operations.

On a GPU the block, its statistics and the hidden states are on the device; the main memory holds
what is read from the files and what is about to be written. On a CPU all of it is main memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import mul

import torch
from transformers import PreTrainedModel

from prunekit.evaluation import measuring_dtype
from prunekit.layout import Block, Linear
from prunekit.memo import WIDEST
from prunekit.placement import Where
from prunekit.pruning import Recipe
from prunekit.ranks import Ranks
from prunekit.refinement import ITERATIONS
from prunekit.room import MARGIN
from prunekit.spread import dealt
from prunekit.stack import StackRunner
from prunekit.statistics import Gram, Statistic
from prunekit.walk import BATCH_TOKENS, vocabulary

REFINED = 7.5
"""Float32 matrices of a layer's size that refining holds: dense, pruned, its copy, four, a mask."""


@dataclass(frozen=True)
class Circumstances:
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


@dataclass(frozen=True)
class Memory:
    """Bytes of the busiest rank at the peak of a run, by what they are for.

    Attributes:
        block: Weights of the largest block, as they run.
        statistics: Of the stages that are gathered at once.
        solve: What the method holds while it prunes a stage.
        results: The pruned block as it will be written, and what is mapped from the files.
        hidden: Hidden states, and what parts of a block gave; ``where`` there is room for them.
        activations: Of one batch within a block.
        ends: Embeddings or head, in the type in which a loss is measured.
        apart: Results are not where blocks run.
        ahead: The next block, which is fetched while one is pruned.
        passing: Hidden states of one batch, as it comes from elsewhere and goes back.
        writer: The whole model with its cache, where it writes its own calibration text before.
        moved: What lies outside the blocks, where its entries get another order.
        where: Of hidden states.
    """

    block: int
    statistics: int
    solve: int
    results: int
    hidden: int
    activations: int
    ends: int
    apart: bool
    ahead: int = 0
    passing: int = 0
    writer: int = 0
    moved: int = 0
    where: Where = "device"

    @property
    def total(self) -> int:
        """Bytes where blocks run: hidden states, and the larger of the loop's peak and the ends."""
        solve = self.solve + (0 if self.apart else self.results)
        loop = self.block + self.ahead
        loop += max(self.statistics + max(solve, self.activations), self.results)
        hidden = self.hidden if self.where == "device" else self.passing
        return max(hidden + max(loop, self.ends), self.writer)

    @property
    def host(self) -> int:
        """Bytes of main memory, beside the process itself."""
        if not self.apart:
            return self.total
        loop = 2 * self.results + self.ahead + (self.hidden if self.where == "host" else 0)
        return max(loop, self.moved)

    @property
    def disk(self) -> int:
        """Bytes of a file beside the checkpoint."""
        return self.hidden if self.where == "disk" else 0

    def placed(self, asked: Where | None, device: int, host: int) -> "Memory":
        """Return this with hidden states where they were asked for, or else have room.

        Args:
            asked: By the user, if at all.
            device: Bytes that are free where blocks run.
            host: Bytes of main memory that are free.
        """
        nearest: tuple[Where, ...] = ("device", "host") if self.apart else ("device",)
        if asked:
            return replace(self, where=asked if asked in nearest else _OTHERWISE[asked])
        made = replace(self, where="device")
        if made.total * MARGIN <= device:
            return made
        made = replace(self, where="host")
        if self.apart and made.host * MARGIN <= host:
            return made
        return replace(self, where="disk")


_OTHERWISE: dict[Where, Where] = {"host": "device", "disk": "disk"}
"""On a CPU main memory is where blocks run."""


def memory(
    model: PreTrainedModel,
    stacks: Sequence[StackRunner],
    blocks: Sequence[Block],
    recipe: Recipe,
    given: Circumstances,
) -> Memory:
    """Return the peak bytes of the busiest rank."""
    modules = [module for runner in stacks for module in runner.blocks]
    sizes = [sum(value.numel() for value in module.parameters()) for module in modules]
    width = max(linear.inputs for block in blocks for linear in block.linears)
    stored = max(given.stored[linear.name].itemsize for block in blocks for linear in block.linears)
    run, streams = given.dtype.itemsize, 1 + recipe.beside
    recovers = recipe.recover == "block"
    features = max(runner.features for runner in stacks)
    hidden = given.tokens * features * run
    # By stage, what a part of a block gave, or before that what its last linear read.
    alone = [stage[0].inputs for block in blocks for stage in block.stages if len(stage) == 1]
    noted = max([features, *(inputs for inputs in alone if inputs <= WIDEST * features)])
    noted += features * (noted > features)  # another shape takes a place of its own
    by_stage = recipe.propagation == "stage"
    remembered = hidden * noted // features if by_stage else 0
    # When its last stage is pruned a block's twin is no more.
    twin = max(sizes) * run * (by_stage and recipe.target == "dense" and not recovers)
    batch = min(given.tokens, BATCH_TOKENS.get(given.device.type, 2048))
    ends = max((module.weight.numel() for module in vocabulary(model, stacks)), default=0)  # pyright: ignore
    return Memory(
        # To tune: float32 weights, gradients and two moments; what blocks read besides.
        block=max(sizes) * (streams * run + 16 * recovers),
        statistics=max(_statistics(block, recipe) for block in blocks),
        solve=max(
            _solve(stage, recipe, given) - twin * (stage is block.stages[-1])
            for block in blocks
            for stage in block.stages
        ),
        results=max(sizes) * stored,
        hidden=streams * (hidden + remembered) if recipe.needs else 0,
        activations=4 * batch * width * run,
        ends=ends * (measuring_dtype(given.dtype, given.device).itemsize + stored),
        apart=given.device.type != "cpu",
        # On a CPU it waits in the system's cache of files.
        ahead=max(sizes) * stored if given.device.type != "cpu" else 0,
        moved=2 * ends * stored * (recipe.permute == "residual"),
        passing=(1 + streams) * (hidden + remembered) * batch // given.tokens,
    )


def _statistics(block: Block, recipe: Recipe) -> int:
    stages = [_bytes(recipe.needs, stage[0].inputs) for stage in block.stages]
    return max(stages, default=0) if recipe.propagation == "stage" else sum(stages)


def _bytes(kinds: Sequence[type[Statistic]], inputs: int) -> int:
    return sum(kind.nbytes(inputs) for kind in kinds)


def _solve(stage: Sequence[Linear], recipe: Recipe, given: Circumstances) -> int:
    """Return the bytes that pruning a stage takes beside its statistics."""
    method = recipe.method
    own = sum(_rows(linear, recipe, given) * linear.inputs for linear in stage)
    aims = recipe.target == "dense"
    matrices = (max(method.copies, REFINED) if recipe.refine else method.copies) + aims
    # An inverse waits for its turn beside the one in use, where there are several.
    waits = given.ranks.several and method.shared_inverses and _inverses(stage, recipe) > 1
    square = stage[0].inputs ** 2
    # What is aimed at takes a factor; with it a cross product is gone before the method begins.
    solving = matrices * own + (method.squares + waits - aims) * square
    aiming = aims * (2 * own + square)
    joined = max(linear.size * given.stored[linear.name].itemsize for linear in stage)
    return int(4 * max(solving, aiming)) + joined


def _rows(linear: Linear, recipe: Recipe, given: Circumstances) -> int:
    """Return how many rows of a linear the busiest rank prunes."""
    return max(_shares(linear, recipe, given.ranks))


def _shares(linear: Linear, recipe: Recipe, ranks: Ranks) -> list[int]:
    """Return how many rows of a linear each rank prunes."""
    parts = None
    if not recipe.apart:
        parts = dealt(recipe.pattern, ranks, linear.outputs, linear.inputs)
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


def work(blocks: Sequence[Block], recipe: Recipe, given: Circumstances) -> Work:
    """Return the operations of each rank."""
    tokens, (_, length) = given.tokens, given.samples
    weights = sum(linear.size for block in blocks for linear in block.linears)
    # Scores and sums of attention: two products over half of the pairs of tokens.
    widths = sum(max(linear.inputs for linear in block.stages[0]) for block in blocks)
    once = 2 * tokens * weights + 2 * tokens * length * widths
    gathered = sum(
        tokens * kind.flops(stage[0].inputs) // (1 if stage[0].expert else kind.every)
        for block in blocks
        for stage in block.pruned_stages
        for kind in recipe.needs
    )
    orders = bool(recipe.permute) + (recipe.permute == "residual")
    forwards = passes(recipe) * (1 + recipe.beside) + orders
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


def _solves(blocks: Sequence[Block], recipe: Recipe, given: Circumstances) -> tuple[int, ...]:
    ranks = Ranks(0, given.ranks.size)
    done = [0] * ranks.size
    for number, block in enumerate(blocks):
        stages = block.pruned_stages
        inverse = [recipe.method.flops_of_inverse(stage[0].inputs) for stage in stages]
        if recipe.apart:
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
        return [[owner] for owner in ranks.owners(works)]
    return [ranks.turns(work, count) for work, count in zip(works, counts, strict=True)]


def traffic(blocks: Sequence[Block], recipe: Recipe, given: Circumstances) -> dict[str, int]:
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
            if recipe.apart:
                continue
            if recipe.method.shared_inverses:
                one = sum(part * others // ranks for part in _parts(Gram, inputs))
                sent["inverses"] += one * _inverses(stage, recipe)
            for linear in stage:
                if dealt(recipe.pattern, given.ranks, linear.outputs, linear.inputs):
                    rows, size = _rows(linear, recipe, given), given.stored[linear.name].itemsize
                    sent["rows"] += others * rows * linear.inputs * size
    return {what: recipe.steps * nbytes for what, nbytes in sent.items()}


def _parts(kind: type[Statistic], inputs: int) -> list[int]:
    """Return the bytes of each part that is sent of a statistic; of an inverse, as of a Gram."""
    return [part.nbytes for part in kind(inputs, "meta").parts()]
