"""Estimate the operations of a run that removes units, from shapes alone.

By block, every block runs once to propagate the hidden states, and again for each ranker. A ranker
that needs the loss differentiates its second run. The loss without a unit takes all blocks from
that of the unit to the last.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import reduce
from itertools import chain
from operator import add
from typing import cast

from torch import Tensor, nn

from prunekit.config.structured_table import StructuredPrune
from prunekit.models.orientation import features
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.units.base import UnitGroup
from prunekit.models.units.kinds import Kind
from prunekit.models.vocabulary import output_heads
from prunekit.statistics import Gram
from prunekit.structured.finalize import linear_groups_of
from prunekit.structured.rankers import Ranker, rankers
from prunekit.structured.refit import refit_flops

REFIT_RUNS = 1.3
"""Forwards of a block that is compensated, whose linears are refitted one after the other."""


@dataclass(frozen=True)
class UnitWork:
    """Floating-point operations of a run on its busiest rank.

    A multiply-add counts as two.

    Attributes:
        forward: Forwards of blocks and of the output head.
        backward: Their gradients.
        gather: Statistics of the inputs of linears.
        solve: Scores and refits from the statistics, in float64 on the CPU.
    """

    forward: int = 0
    backward: int = 0
    gather: int = 0
    solve: int = 0

    def __add__(self, other: "UnitWork") -> "UnitWork":
        return UnitWork(*map(add, astuple(self), astuple(other)))

    def times(self, factor: float) -> "UnitWork":
        """Return the operations of repetitions, or of a part."""
        return UnitWork(*(int(factor * each) for each in astuple(self)))


@dataclass(frozen=True)
class CostInputs:
    """Inputs of the estimate.

    Attributes:
        stacks: The stacks of the model without weights.
        groups: Groups of units of each kind, in the order of the kinds' removal.
        prune: The table ``[prune]``.
        samples: Calibration samples of the busiest rank, and tokens of each.
        few: Samples on which prune.truth measures the loss.
        batch: Most tokens of a batch.
        by_block: One block of weights is in memory at a time.
    """

    stacks: Sequence[StackRunner]
    groups: Mapping[Kind, Sequence[UnitGroup]]
    prune: StructuredPrune
    samples: tuple[int, int]
    few: int
    batch: int
    by_block: bool

    @property
    def kept(self) -> float:
        """Fraction of the units that is kept, about."""
        budget = self.prune.parameters
        return 1 - (self.prune.sparsity or 0.0) if budget is None else budget

    @property
    def most_kept(self) -> float:
        """Largest fraction of the units that a layer may keep."""
        prune = self.prune
        alike = prune.parameters is None and (prune.scope == "layer" or prune.uniform)
        return self.kept if alike else 1.0

    def steps(self, groups: Sequence[UnitGroup]) -> int:
        """Return how often the units of a kind are ranked."""
        if self.prune.steps != "each":
            return self.prune.steps
        units = [group.units for group in groups]
        most = max(units) if self.prune.scope == "layer" else sum(units)
        return max(1, round((1 - self.kept) * most))


def estimate_unit_work(given: CostInputs) -> UnitWork:
    """Return the operations of ranking and compensating, without training and evaluation."""
    whole = _Passes(given, given.samples[0])
    few = _Passes(given, given.few)
    total, blocks = UnitWork(), 1.0
    for kind, groups in given.groups.items():
        work = whole.ranking(given.prune.method, groups).times(given.steps(groups))
        if given.prune.truth:
            work += few.ranking(rankers()["leave-one-out"](), groups)
        if kind == "heads":
            work += whole.report_on_heads(groups)
        total += work.times(blocks)
        # Compared across kinds, blocks are removed last.
        if kind == "blocks" and given.prune.parameters is None:
            blocks *= given.kept
    return total + whole.compensation().times(blocks)


@dataclass(frozen=True)
class _Block:
    """Operations of one forward of a block over all samples."""

    module: nn.Module
    linear: int
    attention: int

    @property
    def forward(self) -> int:
        return self.linear + self.attention

    @property
    def backward(self) -> int:
        """Operations of the gradients by all inputs of linears and products."""
        return self.linear + 2 * self.attention


class _Passes:
    """Operations of passes over the blocks, with a number of samples."""

    def __init__(self, given: CostInputs, samples: int) -> None:
        self.given, self.length = given, given.samples[1]
        self.tokens = samples * self.length
        self.blocks = [
            _Block(module, 2 * self.tokens * parameters, 2 * self.tokens * self.length * width)
            for runner in given.stacks
            for width in [runner.features]
            for module in runner.blocks
            for parameters in [active_parameters(module, runner)]
        ]
        heads = output_heads(given.stacks[0].model)
        self.head = 2 * self.tokens * sum(cast("Tensor", each.weight).numel() for each in heads)

    @property
    def once(self) -> int:
        """Operations of one forward of all blocks.

        The first one runs once more, to see the form of its output.
        """
        return sum(block.forward for block in [self.blocks[0], *self.blocks])

    def ranking(self, ranker: Ranker, groups: Sequence[UnitGroup]) -> UnitWork:
        """Return the operations of ranking units once."""
        parts = [part for part in ranker.components if part.needs_data]
        if not parts:
            return UnitWork()
        needs_loss = any(part.needs_loss for part in parts)
        total = UnitWork(forward=self.once if self.given.by_block else 0)
        if needs_loss:
            total += UnitWork(forward=self.head, backward=self.head)
        works = (
            self._in_block(place, parts, groups, needs_loss=needs_loss)
            for place in range(len(self.blocks))
        )
        return reduce(add, works, total)

    @property
    def first_batch(self) -> float:
        """Fraction of the tokens in the first batch."""
        return min(1.0, max(self.given.batch, self.length) / max(self.tokens, 1))

    def report_on_heads(self, groups: Sequence[UnitGroup]) -> UnitWork:
        """Return the operations of entropies, and of similarities in the first batch."""
        if not self.tokens:
            return UnitWork()
        widths = [features(group.reader.linear)[1] for group in linear_groups_of(groups)]
        similar = UnitWork(self.once, gather=self.tokens * sum(map(Gram.flops, widths)))
        entropies = self.ranking(rankers()["entropy"](), groups)
        return entropies + similar.times(self.first_batch)

    def compensation(self) -> UnitWork:
        """Return the operations of compensating for removed units."""
        how, kept = self.given.prune.compensate, self.given.kept
        groups = linear_groups_of([*chain(*self.given.groups.values())])
        if how == "none" or not groups:
            return UnitWork()
        if how == "bias":
            return UnitWork(forward=self.once)
        widths = [features(group.reader.linear)[1] for group in groups]
        return UnitWork(
            forward=int((REFIT_RUNS + self.first_batch) * self.once),
            gather=self.tokens * sum(map(Gram.flops, widths)),
            solve=sum(refit_flops(group, kept) for group in groups),
        )

    def _in_block(
        self,
        place: int,
        parts: Sequence[Ranker],
        groups: Sequence[UnitGroup],
        *,
        needs_loss: bool,
    ) -> UnitWork:
        """Return the operations of rankers in one block, and of its gradients."""
        block = self.blocks[place]
        inside = [group for group in groups if group.is_in(block.module)]
        total, differentiated = UnitWork(), False
        for part in parts if inside else ():
            total += self._besides(part, inside)
            total += UnitWork(forward=part.forwards * block.forward)
            if part.compares_losses:
                total += self._without_each(place, inside)
            elif part.needs_loss:
                # The first gradient is one by the inputs of the block too.
                first = self.given.by_block and not differentiated
                back = block.backward if first else self._backward_to(block, inside)
                total += UnitWork(forward=block.forward, backward=back)
                differentiated = True
        if needs_loss and self.given.by_block and not differentiated and place:
            total += UnitWork(forward=block.forward, backward=block.backward)
        return total

    def _besides(self, part: Ranker, inside: Sequence[UnitGroup]) -> UnitWork:
        """Return the operations of a ranker besides running the block."""
        linears = {each for group in linear_groups_of(inside) for each in group.linears}
        weights = 2 * self.tokens * sum(cast("Tensor", each.weight).numel() for each in linears)
        costs = [part.cost(group, self.length) for group in inside]
        return UnitWork(
            backward=weights * part.by_weights,
            gather=self.tokens * sum(each.token_flops for each in costs),
            solve=sum(each.flops for each in costs),
        )

    def _without_each(self, place: int, inside: Sequence[UnitGroup]) -> UnitWork:
        """Return the operations of the loss without each unit, and with all."""
        everywhere = inside[0].kind == "hidden"  # coordinates are in all blocks
        if everywhere and place:
            return UnitWork()
        later = self.blocks[place if self.given.by_block else 0 :]
        with_all = self.given.by_block or not place
        one = inside[0].kind == "blocks"  # this block
        variants = with_all + sum(1 if one else group.units for group in inside)
        return UnitWork(forward=variants * (self.head + sum(block.forward for block in later)))

    def _backward_to(self, block: _Block, inside: Sequence[UnitGroup]) -> int:
        """Return the operations of gradients by a block's gates alone."""
        if not self.given.by_block or inside[0].kind == "hidden":
            return block.backward
        readers, writers = 0, 0
        for group in linear_groups_of(inside):
            readers += cast("Tensor", group.reader.linear.weight).numel()
            writers += sum(cast("Tensor", each.linear.weight).numel() for each in group.writers)
        if inside[0].kind == "heads":  # all linears but those that compute them
            return max(block.linear - 2 * self.tokens * writers, 0)
        return 2 * self.tokens * readers


def active_parameters(block: nn.Module, runner: StackRunner) -> int:
    """Return the number of weights that a token is multiplied by."""
    config = runner.model.config.get_text_config()
    total = 0
    for parameter in block.parameters():
        if parameter.ndim == 2:
            total += parameter.numel()
        elif parameter.ndim > 2:  # those of experts, of which a token takes a few
            experts = len(parameter)
            taken = min(getattr(config, "num_experts_per_tok", None) or experts, experts)
            total += parameter.numel() * taken // experts
    return total
