"""Prune one block: gather statistics, then prune stage by stage.

Shapes: O output features, I input features.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from prunekit_kernels import to_host
from prunekit_kernels.pending import Span, is_remote, now, weighted_seconds
from torch import Tensor

from prunekit.distributed.ranks import SINGLE
from prunekit.methods.layer import Layer
from prunekit.methods.magnitude import Magnitude
from prunekit.methods.refine import refine
from prunekit.methods.score_statistics import with_scores
from prunekit.methods.target import reconstruction_target
from prunekit.models.adapters import assign_weight
from prunekit.models.layout import Block, Linear
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.patterns import Pattern
from prunekit.sparsify.block_tuning import tune_block
from prunekit.sparsify.calibrate import Stage, gather_by_stage, gather_statistics
from prunekit.sparsify.error import relative_error
from prunekit.sparsify.kept_pattern import KeptPattern
from prunekit.sparsify.layer_result import LayerResult
from prunekit.sparsify.lowrank import adapt
from prunekit.sparsify.quantize_rows import quantize_rows
from prunekit.sparsify.recipe import Recipe
from prunekit.sparsify.row_sharding import ShardedLinear, row_shards
from prunekit.statistics import CrossGram, StageStatistics

CalibratedStages = list[Stage]
Shards = Mapping[Linear, ShardedLinear]
"""The rows of each linear that this rank prunes."""
LinearWeights = dict[Linear, Float[Tensor, "O I"]]
"""Weights of linears in float32: the rows that this rank prunes."""


class PrunedStage(NamedTuple):
    """A pruned stage: the method's numbers, targets, and scales [O, G]."""

    facts: Mapping[Linear, Mapping[str, object]]
    targets: LinearWeights
    scales: LinearWeights


@dataclass(frozen=True)
class BlockPruner:
    """Prunes loaded blocks in place.

    Attributes:
        recipe: The settings.
        sparsities: Full name of each linear → its sparsity.
        dtypes: Full name of each linear → dtype in which its weight will be stored. The block
            continues with the stored value, so the next one is calibrated on the file's content.
        kept: Full name of each linear → mask of the weights that may be kept; updated to those that
            are. None if all may be kept.
    """

    recipe: Recipe
    sparsities: Mapping[str, float]
    dtypes: Mapping[str, torch.dtype]
    kept: MutableMapping[str, Bool[Tensor, "O I"]] | None = None

    def calibrate(self, loaded: LoadedBlock, block: Block) -> CalibratedStages:
        """Gather the statistics of a dense block, then propagate it."""
        needs, coverage = self.recipe.needs, self.recipe.coverage
        stages = [*gather_statistics(loaded, block.pruned_stages, needs, coverage)]
        loaded.propagate()
        for _, stats in stages:
            stats.ranks = SINGLE  # one rank prunes the block by itself
        return stages

    def prune(
        self, loaded: LoadedBlock, block: Block, calibrated: CalibratedStages | None = None
    ) -> Iterator[LayerResult]:
        """Prune a loaded block; yield the result of each linear.

        A GPU may still be pruning at the end: what ``loaded.checks`` then find is to be looked at
        before the results are used.

        Args:
            loaded: The block, changed in place.
            block: Its linears.
            calibrated: Their statistics; None to gather them.

        Raises:
            NumericsError: A weight or an activation is NaN or inf; names layer and sample.
        """
        loaded.fork_dense()
        try:
            if self.recipe.recover == "block":
                yield from self._prune_and_tune(loaded, block)
            else:
                yield from self._prune_linears(loaded, block, calibrated)
        except Exception:
            loaded.checks.settle()  # they say why a solver fails on values that are not finite
            raise

    def _prune_and_tune(self, loaded: LoadedBlock, block: Block) -> Iterator[LayerResult]:
        """Prune the block, then tune it; layer errors are from before."""
        assert loaded.dense is not None
        results = [*self._prune_linears(loaded, block)]
        loaded.end_stages()
        loaded.dense.advance()
        loaded.checks.settle()  # steps on values that are not finite would take minutes
        errors = tune_block(loaded, block, self.dtypes)
        for result in results:
            yield replace(result, weight=self._stored(loaded, result.linear), recovery=errors)

    def _prune_linears(
        self, loaded: LoadedBlock, block: Block, calibrated: CalibratedStages | None = None
    ) -> Iterator[LayerResult]:
        steps, original = self.recipe.steps, LinearWeights()
        shards = {linear: self._shard(loaded, linear) for linear in block.pruned}
        if steps > 1:
            original = {linear: shards[linear].read(loaded) for linear in block.pruned}
        for step in range(1, steps + 1):
            last = step == steps
            stages = calibrated or self._gather(loaded, block, last=last)
            if self.recipe.propagation == "block":
                stages = self._prepare(stages, shards, step)
            for stage in stages:
                yield from self._prune_stage(
                    loaded, stage, shards, original if last else None, step
                )
                del stage  # before the next one is gathered

    def _gather(self, loaded: LoadedBlock, block: Block, *, last: bool) -> Iterable[Stage]:
        """Yield each stage with its statistics when it is to be pruned."""
        recipe, stages = self.recipe, block.pruned_stages
        if recipe.propagation == "none" and recipe.needs:
            yield from self.calibrate(loaded, block)
        elif recipe.propagation == "block" or not recipe.needs:
            yield from gather_statistics(loaded, stages, recipe.needs, recipe.coverage)
        else:
            last = last and recipe.recover != "block"
            yield from gather_by_stage(loaded, stages, recipe.needs, recipe.coverage, last=last)

    def _prepare(self, stages: Iterable[Stage], shards: Shards, step: int) -> Iterator[Stage]:
        """Let the method prepare on all stages together, then yield each."""
        gathered = [*stages]
        calibrated = [stage for stage in gathered if stage[1].starved != "magnitude"]
        layers = [self._layers(stage, shards, step) for stage in calibrated]
        self.recipe.method.prepare([[*each.values()] for each in layers])
        del calibrated, layers
        # Popped, so that the statistics of a stage are freed once it is pruned.
        while gathered:
            yield gathered.pop(0)

    def _prune_stage(
        self,
        loaded: LoadedBlock,
        stage: Stage,
        shards: Shards,
        original: LinearWeights | None,
        step: int,
    ) -> Iterator[LayerResult]:
        """Prune the linears of a stage; yield results if wanted.

        ``original`` is None but in the last step; then it has the weights from before the first.
        """
        began, (linears, stats) = now(loaded.device), stage
        dense = {linear: shards[linear].read(loaded) for linear in linears}
        done = self._prune_weights(loaded, dense, shards, stats, step)
        pruned = now(loaded.device)
        if original is None or not self.recipe.yields_results:
            return
        for linear in linears:
            result = self._measure(
                loaded,
                shards[linear],
                original.get(linear, dense[linear]),
                stats,
                facts=done.facts.get(linear, {}),
                span=(linear.size / sum(other.size for other in linears), began, pruned),
            )
            if self.recipe.recover == "lowrank" and linear in done.targets:
                weights = done.targets[linear], dense[linear]
                how = self.recipe.recover_rank, self.dtypes[linear.name]
                adapter, error = adapt(loaded, shards[linear], weights, stats, *how)
                result = replace(result, recovery={"recovered_error": error}, adapter=adapter)
            yield replace(result, scale=done.scales.get(linear))

    @torch.no_grad()
    def _prune_weights(
        self,
        loaded: LoadedBlock,
        dense: LinearWeights,
        shards: Shards,
        stats: StageStatistics,
        step: int,
    ) -> PrunedStage:
        """Prune the linears of a stage in place.

        Args:
            loaded: The block, changed in place.
            dense: Weights of the linears, left as they are.
            shards: The rows of each that this rank prunes.
            stats: Statistics of the stage.
            step: Which of the recipe's steps this is.
        """
        layers = {
            linear: replace(layer, weight=self._target(linear, dense[linear], stats))
            for linear, layer in self._layers(([*dense], stats), shards, step).items()
        }
        stats.drop(CrossGram)  # only the targets need it
        by_magnitude = stats.starved == "magnitude"
        method = Magnitude() if by_magnitude else self.recipe.method
        pruned = method.prune_together([*layers.values()])
        if self.recipe.refine and not by_magnitude:
            pruned = [*map(refine, layers.values(), pruned)]
        scales = LinearWeights()
        if quantization := self.recipe.quantizes(step):
            for at, (linear, layer) in enumerate(layers.items()):
                how = quantization, self.dtypes[linear.name]
                found = quantize_rows(layer, pruned[at], shards[linear], *how)
                pruned[at], scales[linear] = found.layer, found.scale
        for linear, found in zip(layers, pruned, strict=True):
            weight = shards[linear].gather(found.weight.to(self.dtypes[linear.name]))
            assign_weight(loaded.module.get_submodule(linear.path), weight)
            if self.kept is not None:
                self.kept[linear.name] = found.keep
        facts = {linear: found.facts for linear, found in zip(layers, pruned, strict=True)}
        targets = {linear: layer.weight for linear, layer in layers.items()}
        return PrunedStage(facts, targets, scales)

    def _layers(self, stage: Stage, shards: Shards, step: int) -> dict[Linear, Layer]:
        """Return the layers pruned in this step, with meta weights."""
        (linears, stats), layers = stage, dict[Linear, Layer]()
        for linear in linears:
            sparsity = self.recipe.sparsity(step, self.sparsities[linear.name])
            if sparsity > 0 or self.recipe.quantizes(step):
                pattern, rows = shards[linear].shard(self._pattern(linear))
                if self.kept is not None:
                    pattern = KeptPattern(pattern, self.kept[linear.name])
                shape = linear.outputs, linear.inputs
                weight = torch.empty(*shape, device="meta")[shards[linear].rows]
                base = linear.name, weight, stats, pattern, sparsity, rows
                layers[linear] = Layer(*base, summarized=self.recipe.yields_results)
        return layers

    def _target(
        self, linear: Linear, weight: Float[Tensor, "O I"], stats: StageStatistics
    ) -> Float[Tensor, "O I"]:
        """Return the weight that the pruned one is to approximate."""
        if self.recipe.target != "dense" or linear.expert:
            return weight
        return reconstruction_target(weight, stats, linear.outputs)

    @torch.no_grad()
    def _measure(
        self,
        loaded: LoadedBlock,
        shard: ShardedLinear,
        before: Float[Tensor, "O I"],
        stats: StageStatistics,
        *,
        facts: Mapping[str, object],
        span: Span,
    ) -> LayerResult:
        """Return a linear's result; it took ``span``, and the time of measuring."""
        began, linear = now(loaded.device), shard.linear
        weight = shard.read(loaded)
        zeros = (weight == 0).sum()[None]
        shard.sharing.all_reduce_sum(zeros, "errors")
        error = relative_error(before, weight, stats, shard.sharing)
        pattern = self._pattern(linear).name
        return LayerResult(
            linear,
            self._stored(loaded, linear),
            sparsity=to_host(zeros, lambda count: int(count) / linear.size),
            relative_error=error,
            seconds=weighted_seconds(span, (1.0, began, now(loaded.device))),
            tokens=stats.routed,
            starved=stats.starved,
            pattern=pattern if pattern != self.recipe.pattern.name else None,
            facts=with_scores(facts, lambda rows: shard.gather(rows, "scores"), linear.size),
        )

    def _shard(self, loaded: LoadedBlock, linear: Linear) -> ShardedLinear:
        shards = None
        if not self.recipe.blocks_independent:  # then whole blocks are split over ranks
            shards = row_shards(self.recipe.pattern, loaded.ranks, linear.outputs, linear.inputs)
        return ShardedLinear(linear, shards, loaded.ranks)

    def _pattern(self, linear: Linear) -> Pattern:
        """Return a linear's pattern; an allocation may choose another n of m."""
        return self.recipe.pattern.at(self.sparsities[linear.name])

    def _stored(self, loaded: LoadedBlock, linear: Linear) -> Tensor:
        """Return a CPU copy of a linear's stored weight, perhaps pending."""
        weight = loaded.module.get_parameter(f"{linear.path}.weight").detach()
        copy = not is_remote(weight.device)  # else the way to the CPU makes one
        return to_host(weight.to(self.dtypes[linear.name], copy=copy), lambda stored: stored)
