"""Prunes one block: gather what its methods need, prune linear by linear.

Shapes: O output features, I input features, T tokens.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit.checkpoint.adapter import Adapter
from prunekit.distributed.ranks import SINGLE
from prunekit.methods.layer import Layer, Rows
from prunekit.methods.magnitude import Magnitude
from prunekit.methods.refine import refine
from prunekit.methods.target import reconstruction_target
from prunekit.models.layout import Block, Linear, orientation, read
from prunekit.models.sequential.pipeline import LoadedBlock
from prunekit.patterns import Pattern
from prunekit.sparsify.block_tuning import reconstruct
from prunekit.sparsify.calibrate import gather, gather_in_turn
from prunekit.sparsify.error import relative_error
from prunekit.sparsify.lowrank import factors
from prunekit.sparsify.recipe import Recipe
from prunekit.sparsify.row_sharding import row_shards, shard_pattern
from prunekit.statistics import CrossGram, Gram, StageStatistics

Stage = tuple[Sequence[Linear], StageStatistics]
"""The linears of a stage with what they read."""
CalibratedStages = list[Stage]
Parts = list[slice] | None
"""The rows of a linear that each rank prunes; None where each prunes all of them."""


@dataclass(frozen=True)
class Outcome:
    """What became of one linear: its weight as it will be stored and its entry in the report.

    ``adapter``: what is stored beside it and added to it.
    """

    linear: Linear
    weight: Tensor
    entry: dict[str, Any]
    adapter: Adapter | None = None


@dataclass(frozen=True)
class BlockPruner:
    """Prunes loaded blocks in place.

    Attributes:
        recipe: How.
        sparsities: Full name of each linear → its sparsity.
        dtypes: Full name → the type in which its weight will be stored. The block goes on with the
            stored value, so that the next one is calibrated on what the file holds.
    """

    recipe: Recipe
    sparsities: Mapping[str, float]
    dtypes: Mapping[str, torch.dtype]

    def calibrate(self, visit: LoadedBlock, plan: Block) -> CalibratedStages:
        """Gather what the dense model gives a block, for all ranks, and let it go on.

        What is given is for one rank to prune by itself.
        """
        stages = [*gather(visit, plan.pruned_stages, self.recipe.needs, self.recipe.hunger)]
        if visit.propagates:
            visit.advance()
            visit.propagates = False
        for _, stats in stages:
            stats.ranks = SINGLE
        visit.ranks = SINGLE
        return stages

    def prune(
        self, visit: LoadedBlock, plan: Block, looked: CalibratedStages | None = None
    ) -> Iterator[Outcome]:
        """Prune the visited block and yield each of its linears when it is done.

        ``looked``: what it reads, if that is known.

        Raises:
            NumericsError: A weight or an activation is NaN or inf; layer and sample are named.
        """
        visit.fork_dense()
        if self.recipe.recover == "block":
            yield from self._recovered(visit, plan)
        else:
            yield from self._linears(visit, plan, looked)

    def _recovered(self, visit: LoadedBlock, plan: Block) -> Iterator[Outcome]:
        """Prune the block, then tune what stays of it as a whole; errors are those before that."""
        dense, onward = visit.dense, visit.propagates
        assert dense is not None
        outcomes = [*self._linears(visit, plan)]
        visit.cache = dense.cache = None  # the block is about to change
        dense.advance()
        dense.propagates = False
        facts = reconstruct(visit, plan, self.dtypes)
        visit.propagates = onward
        for outcome in outcomes:
            weight = self._stored(visit, outcome.linear)
            yield replace(outcome, weight=weight, entry=outcome.entry | facts)

    def _linears(
        self, visit: LoadedBlock, plan: Block, looked: CalibratedStages | None = None
    ) -> Iterator[Outcome]:
        several = self.recipe.steps > 1
        rows = {linear: self._dealt(visit, linear) for linear in plan.pruned}
        first = {linear: _weight(visit, linear, rows[linear]) for linear in plan.pruned if several}
        for step in range(1, self.recipe.steps + 1):
            last = step == self.recipe.steps
            stages = looked or self._gather(visit, plan, last=last)
            if self.recipe.propagation == "block":
                stages = self._prepared(visit, stages, rows, step)
            for stage in stages:
                yield from self._stage(visit, stage, rows, first if last else None, step)
                del stage  # while the next one is looked at

    def _stage(
        self,
        visit: LoadedBlock,
        stage: Stage,
        rows: Mapping[Linear, Parts],
        first: Mapping[Linear, Tensor] | None,
        step: int,
    ) -> Iterator[Outcome]:
        """Prune the linears of a stage; yield them after the last step, ``first`` being known then.

        ``first``: the weights before the first step, where there are several.
        """
        began, (linears, stats) = time.perf_counter(), stage
        dense = {linear: _weight(visit, linear, rows[linear]) for linear in linears}
        facts, wanted = self._prune(visit, dense, rows, stats, step)
        seconds = time.perf_counter() - began
        if first is None:
            return
        for linear in linears:
            began = time.perf_counter()
            weight = first.get(linear, dense[linear])
            outcome = self._outcome(visit, linear, weight, rows[linear], stats)
            share = linear.size / sum(other.size for other in linears)
            outcome.entry["seconds"] = share * seconds + time.perf_counter() - began
            outcome.entry.update(facts.get(linear.name, {}))
            if self.recipe.recover == "lowrank" and linear in wanted:
                aims = wanted[linear], dense[linear]
                outcome = self._given_back(visit, outcome, aims, rows[linear], stats)
            yield outcome

    def _gather(
        self, visit: LoadedBlock, plan: Block, *, last: bool
    ) -> Iterable[tuple[Sequence[Linear], StageStatistics]]:
        """Give the linears of each stage with their statistics when they are to be pruned."""
        stages, needs, hunger = plan.pruned_stages, self.recipe.needs, self.recipe.hunger
        if self.recipe.propagation == "none" and needs:
            yield from self.calibrate(visit, plan)
        elif self.recipe.propagation == "block" or not needs:
            yield from gather(visit, stages, needs, hunger)
        else:
            last = last and self.recipe.recover != "block"
            yield from gather_in_turn(visit, stages, needs, hunger, last=last)

    def _dealt(self, visit: LoadedBlock, linear: Linear) -> Parts:
        if self.recipe.blocks_independent:  # blocks are dealt, not rows
            return None
        return row_shards(self.recipe.pattern, visit.ranks, linear.outputs, linear.inputs)

    def _pattern(self, linear: Linear) -> Pattern:
        """Return the pattern of a linear, which an allocation may have made another n:m."""
        return self.recipe.pattern.at(self.sparsities[linear.name])

    def _share(
        self, visit: LoadedBlock, linear: Linear, rows: Parts
    ) -> tuple[Pattern, Rows | None]:
        """Return by what pattern this rank prunes its rows of a linear, and which they are."""
        pattern, ranks = self._pattern(linear), visit.ranks
        if rows is None:
            return pattern, None
        pattern = shard_pattern(pattern, ranks, linear.outputs, linear.inputs)
        return pattern, Rows(rows[ranks.rank].start, linear.outputs, ranks)

    def _layers(
        self, visit: LoadedBlock, stage: Stage, rows: Mapping[Linear, Parts], step: int
    ) -> dict[Linear, Layer]:
        """Return what is pruned of a stage in this step; of weights there is the shape only."""
        linears, stats = stage
        layers: dict[Linear, Layer] = {}
        for linear in linears:
            if (sparsity := self.recipe.sparsity(step, self.sparsities[linear.name])) > 0:
                pattern, held = self._share(visit, linear, rows[linear])
                whole = torch.empty(linear.outputs, linear.inputs, device="meta")
                weight = whole[_own(visit, rows[linear])]
                layers[linear] = Layer(linear.name, weight, stats, pattern, sparsity, held)
        return layers

    def _prepared(
        self, visit: LoadedBlock, stages: Iterable[Stage], rows: Mapping[Linear, Parts], step: int
    ) -> Iterator[Stage]:
        """Give stages, all gathered, once the method did what it can before any is pruned."""
        known = [*stages]
        fed = [stage for stage in known if stage[1].starved != "magnitude"]
        layers = [self._layers(visit, stage, rows, step) for stage in fed]
        self.recipe.method.prepare([[*each.values()] for each in layers])
        del fed, layers
        # Of what was gathered for a stage, and made of it, nothing stays once it is pruned.
        while known:
            yield known.pop(0)

    @torch.no_grad()
    def _prune(
        self,
        visit: LoadedBlock,
        dense: Mapping[Linear, Tensor],
        rows: Mapping[Linear, Parts],
        stats: StageStatistics,
        step: int,
    ) -> tuple[dict[str, dict[str, float]], dict[Linear, Tensor]]:
        """Prune the linears of a stage in place; ``dense``, their weights, is left as it is.

        Args:
            visit: The block.
            dense: The rows of each linear that this rank has.
            rows: Which each rank has; None for all.
            stats: What was gathered for the stage.
            step: Which of the recipe's steps this is.

        Returns:
            What is to be said of each by name, and the weights that each aimed at.
        """
        layers = {
            linear: replace(layer, weight=self._aimed(linear, dense[linear], stats))
            for linear, layer in self._layers(visit, ([*dense], stats), rows, step).items()
        }
        stats.drop(CrossGram)  # it has told what the weights aim at
        by_magnitude = stats.starved == "magnitude"
        method = Magnitude() if by_magnitude else self.recipe.method
        pruned = method.prune_together([*layers.values()])
        if self.recipe.refine and not by_magnitude:
            pruned = [*map(refine, layers.values(), pruned)]
        for linear, found in zip(layers, pruned, strict=True):
            module = visit.block.get_submodule(linear.path)
            weight = found.weight.to(self.dtypes[linear.name])
            if parts := rows[linear]:
                weight = visit.ranks.all_gather_rows(weight, parts)
            module.weight.copy_(weight.T if orientation(module)[2] else weight)  # pyright: ignore
        facts = {
            layer.name: found.facts for layer, found in zip(layers.values(), pruned, strict=True)
        }
        return facts, {linear: layer.weight for linear, layer in layers.items()}

    def _aimed(
        self, linear: Linear, weight: Float[Tensor, "O I"], stats: StageStatistics
    ) -> Float[Tensor, "O I"]:
        if self.recipe.target != "dense" or linear.expert:
            return weight
        return reconstruction_target(weight, stats, linear.outputs)

    @torch.no_grad()
    def _outcome(
        self, visit: LoadedBlock, linear: Linear, dense: Tensor, rows: Parts, stats: StageStatistics
    ) -> Outcome:
        weight = _weight(visit, linear, rows)
        zeros = (weight == 0).sum()[None]
        ranks = visit.ranks if rows else SINGLE
        ranks.all_reduce_sum(zeros, "errors")
        entry = {
            "name": linear.name,
            "shape": [linear.outputs, linear.inputs],
            "sparsity": int(zeros) / linear.size,
            "relative_error": relative_error(dense, weight, stats, ranks),
        }
        if stats.routed is not None:
            entry |= {"tokens": stats.routed, "starved": stats.starved}
        if (pattern := self._pattern(linear)).name != self.recipe.pattern.name:
            entry["pattern"] = pattern.name
        return Outcome(linear, self._stored(visit, linear), entry)

    @torch.no_grad()
    def _given_back(
        self,
        visit: LoadedBlock,
        outcome: Outcome,
        aims: tuple[Tensor, Tensor],
        rows: Parts,
        stats: StageStatistics,
    ) -> Outcome:
        """Let the block go on with an adapter added to a linear; say what its error is then.

        ``aims``: what the weight aimed at, and what it was.
        """
        linear, (wanted, dense) = outcome.linear, aims
        lost = wanted - _weight(visit, linear, rows)
        lost = visit.ranks.all_gather_rows(lost, rows) if rows else lost
        found = factors(lost, stats[Gram].full, self.recipe.recover_rank)
        dtype = self.dtypes[linear.name]
        adapter = Adapter(found.up.to(dtype), found.down.to(dtype))
        adapter.add_to(visit.block.get_submodule(linear.path))
        whole = _weight(visit, linear, rows)
        ranks = visit.ranks if rows else SINGLE
        entry = {"recovered_error": relative_error(dense, whole, stats, ranks)}
        kept = Adapter(adapter.up.cpu(), adapter.down.cpu())
        return replace(outcome, entry=outcome.entry | entry, adapter=kept)

    def _stored(self, visit: LoadedBlock, linear: Linear) -> Tensor:
        """Return a linear's weight as it is now, as it will be written."""
        weight = visit.block.get_parameter(f"{linear.path}.weight").detach()
        return weight.to(self.dtypes[linear.name], copy=True).cpu()


def _own(visit: LoadedBlock, rows: Parts) -> slice:
    """Return the rows that this rank prunes."""
    return rows[visit.ranks.rank] if rows else slice(None)


def _weight(visit: LoadedBlock, linear: Linear, rows: Parts) -> Float[Tensor, "O I"]:
    """Return a float32 copy of the rows of a linear that this rank prunes."""
    return read(visit.block, linear, _own(visit, rows))
