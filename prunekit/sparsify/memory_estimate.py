"""TODO-DOC prunekit/sparsify/memory_estimate.py (out of prunekit/footprint.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from prunekit.models.devices import measuring_dtype
from prunekit.models.layout import Block, Linear
from prunekit.models.memory import MARGIN
from prunekit.models.sequential.activation_cache import WIDEST
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.hidden_states import Where
from prunekit.models.sequential.pipeline import BATCH_TOKENS
from prunekit.models.vocabulary import vocabulary
from prunekit.sparsify.recipe import Recipe
from prunekit.sparsify.work_estimate import CostInputs, _inverses, _rows
from prunekit.statistics import Statistic

REFINED = 7.5
"""Float32 matrices of a layer's size that refining holds: dense, pruned, its copy, four, a mask."""


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
    given: CostInputs,
) -> Memory:
    """Return the peak bytes of the busiest rank."""
    modules = [module for runner in stacks for module in runner.blocks]
    sizes = [sum(value.numel() for value in module.parameters()) for module in modules]
    width = max(linear.inputs for block in blocks for linear in block.linears)
    stored = max(given.stored[linear.name].itemsize for block in blocks for linear in block.linears)
    run, streams = given.dtype.itemsize, 1 + recipe.runs_dense_model
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


def _solve(stage: Sequence[Linear], recipe: Recipe, given: CostInputs) -> int:
    """Return the bytes that pruning a stage takes beside its statistics."""
    method = recipe.method
    own = sum(_rows(linear, recipe, given) * linear.inputs for linear in stage)
    aims = recipe.target == "dense"
    matrices = (max(method.copies, REFINED) if recipe.refine else method.copies) + aims
    # An inverse waits for its turn beside the one in use, where there are several.
    waits = given.ranks.is_distributed and method.shared_inverses and _inverses(stage, recipe) > 1
    square = stage[0].inputs ** 2
    # What is aimed at takes a factor; with it a cross product is gone before the method begins.
    solving = matrices * own + (method.squares + waits - aims) * square
    aiming = aims * (2 * own + square)
    joined = max(linear.size * given.stored[linear.name].itemsize for linear in stage)
    return int(4 * max(solving, aiming)) + joined
