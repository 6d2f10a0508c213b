"""Estimate the peak memory of a run from shapes alone.

On a GPU the block, its statistics and the hidden states are on the device; main memory holds
tensors read from files and results about to be written. On a CPU all of it is main memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.models.devices import loss_dtype
from prunekit.models.layout import Block, Linear
from prunekit.models.memory import ESTIMATE_MARGIN
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.cached_module import MAX_INPUT_WIDTH
from prunekit.models.sequential.hidden_states import Where
from prunekit.models.sequential.pipeline import BATCH_TOKENS
from prunekit.models.vocabulary import vocabulary_modules
from prunekit.sparsify.recipe import Recipe
from prunekit.sparsify.work_estimate import CostInputs, inverse_count, max_rows
from prunekit.statistics import Statistic

REFINED = 7.5
"""Float32 matrices of a layer's size while refining: dense, pruned, its copy, four more, a mask."""

QUANTIZED = 8.5
"""The same while quantizing: dense, pruned, as stored, rounded, scales, errors, residuals."""

PACKED = 0.5625
"""Of a block's bytes: the same block with half of its weights packed, which is made of it."""


@dataclass(frozen=True)
class Memory:
    """Peak bytes of a run on the busiest rank, by purpose.

    Attributes:
        block: Weights of the largest block, in the dtype in which it runs.
        statistics: Statistics of the stages that are gathered at once, at the peak.
        solve: Working memory of the method while it prunes a stage, at the peak.
        results: The pruned block as it will be written, and pages mapped from files.
        waiting: The block before it, which is written meanwhile; pinned where it is from a GPU.
        hidden: Hidden states and cached outputs of modules, stored at ``where``.
        activations: Intermediate activations of one batch within a block.
        vocabulary: Embeddings or head, in the dtype in which a loss is measured.
        separate_host: The device has memory of its own, so results are in another one.
        prefetched: The next block, which is fetched while one is pruned.
        in_transit: Hidden states of one batch on their way from and to main memory or disk.
        writer: The whole model with its key-value cache, where it generates calibration text.
        permuted: Tensors outside the blocks, where their entries are permuted.
        images: Images of all samples, and what blocks are called with for them.
        where: Storage of hidden states.
    """

    block: int
    statistics: int
    solve: int
    results: int
    hidden: int
    activations: int
    vocabulary: int
    separate_host: bool
    waiting: int = 0
    prefetched: int = 0
    in_transit: int = 0
    writer: int = 0
    permuted: int = 0
    images: int = 0
    where: Where = "device"

    @property
    def total(self) -> int:
        """Bytes on the device that runs blocks.

        Hidden states, and the larger of the main loop's peak and the vocabulary.
        """
        solve = self.solve + (0 if self.separate_host else self.results)
        loop = self.block + self.prefetched + (0 if self.separate_host else self.waiting)
        loop += max(self.statistics + max(solve, self.activations), self.results)
        hidden = self.hidden if self.where == "device" else self.in_transit
        images = 0 if self.separate_host else self.images
        return max(images + hidden + max(loop, self.vocabulary), self.writer)

    @property
    def host(self) -> int:
        """Bytes of main memory, without the process itself."""
        if not self.separate_host:
            return self.total
        # Two blocks are pinned, one that is pruned and one that waits.
        loop = self.results + 2 * self.waiting + self.prefetched
        loop += self.hidden if self.where == "host" else 0
        return self.images + max(loop, self.permuted)

    @property
    def disk(self) -> int:
        """Bytes of a temporary file beside the checkpoint."""
        return self.hidden if self.where == "disk" else 0

    def placed(self, requested: Where | None, device: int, host: int) -> "Memory":
        """Return this estimate with a storage for hidden states.

        Args:
            requested: The user's choice; None for the nearest storage that has enough free bytes.
            device: Free bytes on the device that runs blocks.
            host: Free bytes of main memory.
        """
        nearest: tuple[Where, ...] = ("device", "host") if self.separate_host else ("device",)
        if requested:
            return replace(
                self, where=requested if requested in nearest else _CPU_STORAGE[requested]
            )
        made = replace(self, where="device")
        if made.total * ESTIMATE_MARGIN <= device:
            return made
        made = replace(self, where="host")
        if self.separate_host and made.host * ESTIMATE_MARGIN <= host:
            return made
        return replace(self, where="disk")


_CPU_STORAGE: dict[Where, Where] = {"host": "device", "disk": "disk"}
"""Replacements on a CPU, which runs blocks in main memory."""


def estimate_memory(
    model: PreTrainedModel,
    stacks: Sequence[StackRunner],
    blocks: Sequence[Block],
    recipe: Recipe,
    costs: CostInputs,
) -> Memory:
    """Return the peak bytes of the busiest rank.

    Args:
        model: The model without weights.
        stacks: Its stacks.
        blocks: Its blocks and linears.
        recipe: The settings.
        costs: Device, dtypes and sizes that the estimate depends on.
    """
    sizes = [_parameters(module) for runner in stacks for module in runner.blocks]
    width = max(linear.inputs for block in blocks for linear in block.linears)
    stored = max(costs.stored[linear.name].itemsize for block in blocks for linear in block.linears)
    run, streams = costs.dtype.itemsize, 1 + recipe.runs_dense_model
    recovers = recipe.recover == "block"
    features = max(runner.features for runner in stacks)
    hidden = costs.tokens * features * run
    by_stage = recipe.propagation == "stage"
    cached_bytes = hidden * _cached_features(blocks, features) // features if by_stage else 0
    batch = min(costs.tokens, BATCH_TOKENS.get(costs.device.type, 2048))
    modules = vocabulary_modules(model, [runner.module for runner in stacks])
    vocabulary = max((cast("Tensor", each.weight).numel() for each in modules), default=0)
    common = Memory(
        # Tuning holds float32 weights, gradients and two moments.
        block=max(sizes) * (streams * run + 16 * recovers),
        statistics=0,
        solve=0,
        results=max(sizes) * stored,
        hidden=streams * (hidden + cached_bytes) if recipe.needs else 0,
        activations=4 * batch * width * run,
        vocabulary=vocabulary * (loss_dtype(costs.dtype, costs.device).itemsize + stored),
        separate_host=costs.device.type != "cpu",
        waiting=0 if recipe.blocks_independent else _waiting(blocks, costs),
        # On a CPU it is in the system's page cache.
        prefetched=max(sizes) * stored if costs.device.type != "cpu" else 0,
        permuted=2 * vocabulary * stored * (recipe.permute == "residual"),
        in_transit=(1 + streams) * (hidden + cached_bytes) * batch // costs.tokens,
    )
    stages = _stage_bytes(blocks, recipe, costs, max(sizes) * run)
    memories = (replace(common, statistics=held, solve=solve) for held, solve in stages)
    return max(memories, key=lambda each: (each.total, each.statistics + each.solve))


def recorded_bytes(stacks: Sequence[StackRunner], lengths: Sequence[int]) -> int:
    """Return the bytes of block arguments for samples of these lengths.

    Two masks, of all tokens and of a window, and two tables of rotary embeddings.
    """
    features = max(runner.features for runner in stacks)
    return sum(2 * length * length + 4 * 4 * length * min(features, 256) for length in lengths)


def _waiting(blocks: Sequence[Block], costs: CostInputs) -> int:
    """Return the bytes of a pruned block that waits to be written."""

    def nbytes(linear: Linear) -> int:
        size = linear.size * costs.stored[linear.name].itemsize
        # PyTorch pins powers of two.
        return size if costs.device.type == "cpu" else 1 << (size - 1).bit_length()

    whole = max(sum(map(nbytes, block.pruned)) for block in blocks)
    return whole + int(PACKED * whole * costs.packs)


def _parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def _cached_features(blocks: Sequence[Block], features: int) -> int:
    """Return the features per token that the activation cache holds.

    These are a module's output or, before that, the input of its last linear.
    """
    single = [stage[0].inputs for block in blocks for stage in block.stages if len(stage) == 1]
    cached = max([features, *(inputs for inputs in single if inputs <= MAX_INPUT_WIDTH * features)])
    return cached + features * (cached > features)  # another shape takes a slot of its own


def _stage_bytes(
    blocks: Sequence[Block], recipe: Recipe, costs: CostInputs, block_bytes: int
) -> Iterator[tuple[int, int]]:
    """Yield the bytes of statistics and of solving for each stage."""
    by_stage = recipe.propagation == "stage"
    # The dense copy of a block is dropped before its last stage is pruned.
    dropped = by_stage and recipe.target == "dense" and recipe.recover != "block"
    for block in blocks:
        for stage in block.stages:
            held = _statistics([stage] if by_stage else block.stages, recipe)
            last = stage is block.stages[-1]
            yield held, _solve(stage, recipe, costs) - block_bytes * (dropped and last)


def _statistics(stages: Sequence[Sequence[Linear]], recipe: Recipe) -> int:
    return sum(_bytes(recipe.needs, stage[0].inputs) for stage in stages)


def _bytes(kinds: Sequence[type[Statistic]], inputs: int) -> int:
    return sum(kind.nbytes(inputs) for kind in kinds)


def _solve(stage: Sequence[Linear], recipe: Recipe, costs: CostInputs) -> int:
    """Return the bytes of pruning a stage, without its statistics."""
    method = recipe.method
    own = sum(max_rows(linear, recipe, costs) * linear.inputs for linear in stage)
    dense_target = recipe.target == "dense"
    rounds = recipe.quantize is not None and recipe.quantize.compensates
    matrices = max(method.copies, REFINED * bool(recipe.refine), QUANTIZED * rounds) + dense_target
    # Where there are several inverses, the next one is held beside the one in use.
    waits = (
        costs.ranks.is_distributed and method.shared_inverses and inverse_count(stage, recipe) > 1
    )
    square = stage[0].inputs ** 2
    squares = method.squares + method.kept_squares([linear.outputs for linear in stage])
    # Targets need a factor of the Gram matrix; the cross Gram matrix is dropped before the method.
    solving = matrices * own + (squares + waits + 2 * rounds - dense_target) * square
    targets = dense_target * (2 * own + square)
    gathered_rows = max(linear.size * costs.stored[linear.name].itemsize for linear in stage)
    return int(4 * max(solving, targets)) + gathered_rows
