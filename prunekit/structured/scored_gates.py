"""Gates with scoring and pruning: reversible, without a change of weights.

Shapes: U units of a group.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor

from prunekit.allocations.schedules import linear as linear_schedule
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError, PrunekitError
from prunekit.models.in_memory import is_flattened, is_sharded
from prunekit.models.units.heads_neurons import LinearUnitGroup
from prunekit.structured.agreement import redundancy
from prunekit.structured.batches import Batch, Data, eval_mode, to_batches
from prunekit.structured.blockwise.block_passes import BlockPasses
from prunekit.structured.blockwise.scores import score_blockwise
from prunekit.structured.gate_set import GateSet
from prunekit.structured.rankers import GatedModel, Ranker, Scores, rankers
from prunekit.structured.refit import reader_grams
from prunekit.structured.selection import (
    RemovedUnit,
    UnitScope,
    check_covers,
    check_some_pruned,
    check_whole,
    fewest_units,
    refuse_nan_scores,
    select_units,
)


class ScoredGates(GateSet):
    """Gates on all units of one kind, with scoring and pruning."""

    def score(
        self,
        ranker: str | Ranker,
        data: Data | None = None,
        *,
        ranks: Ranks = SINGLE,
        **settings: Any,  # noqa: ANN401
    ) -> Scores:
        """Return the score of each unit with the current gates.

        Units of a layer without any open one have the score 0.

        Args:
            ranker: A ranker, or its name.
            data: Token ids [N, T] or batches; None for a ranker of weights alone.
            ranks: Processes with gates on the same model and other data.
            settings: Settings of a ranker given by name.

        Raises:
            ConfigError: The ranker or a setting is unknown, the ranker does not rank this kind, or
                the data lacks an input. FSDP 1 or ZeRO-3 shards the model; or FSDP 2 does, and
                processes have different numbers of batches, or the ranker needs gradients of
                weights.
        """
        chosen = self._ranker(ranker, settings)
        found = to_batches(data, self.model) if chosen.needs_data else []
        self._check_sharded(found, ranks)
        return self._scores(found, ranks, chosen.score)

    def score_blockwise(self, ranker: Ranker, passes: BlockPasses) -> Scores:
        """Return the scores of :meth:`score`, measured block by block.

        One block of weights is in memory at a time.

        Args:
            ranker: The ranker.
            passes: Passes over the blocks of this model.

        Raises:
            ConfigError: The ranker does not rank this kind, or labels are missing.
            CheckpointError: See :meth:`BlockPasses.backward`.
        """
        chosen = self._ranker(ranker, {})
        score = partial(score_blockwise, chosen, passes=passes)
        return self._scores(passes.batches, passes.ranks, score)

    def _scores(
        self, batches: Sequence[Batch], ranks: Ranks, score: Callable[[GatedModel], Scores]
    ) -> Scores:
        """Return the scores; 0 for groups without an open gate."""
        gated = self._gated_model(batches)
        groups = [each for each in gated.groups if bool(self.gates[each.name].keep.any())]
        with eval_mode(self.model):
            scores = score(replace(gated, groups=groups, ranks=ranks)) if groups else {}
        closed = {each.name: torch.zeros(each.units, dtype=torch.float64) for each in self.groups}
        return closed | scores

    def prune(
        self,
        scores: Scores,
        sparsity: float,
        *,
        scope: UnitScope = "global",
        least: int = 1,
        round_to: int = 1,
    ) -> list[RemovedUnit]:
        """Close the gates of the units with the lowest scores.

        Args:
            scores: Score of each unit, by group name.
            sparsity: Fraction of all units that is pruned afterwards.
            scope: "global" or "layer"; see :func:`prunekit.structured.selection.select_units`.
            least: Units that every layer keeps; 0 lets all heads of an attention or all neurons of
                a feed-forward be pruned, which :meth:`Gates.finalize` then takes out.
            round_to: Every width made up by the kept units is rounded up to a multiple of this,
                and of the heads where transformers divides the hidden size among them.

        Raises:
            ConfigError: The count is impossible, a score is not a number, or no unit is pruned
                though ``sparsity`` is above 0.
            ShapeError: Fewer experts would be open than each token takes.
        """
        chosen = self.close_lowest(scores, sparsity, scope=scope, least=least, round_to=round_to)
        try:
            self._check_some_pruned(sparsity)
        except ConfigError:
            self.undo()
            raise
        return chosen

    def close_lowest(
        self,
        scores: Scores,
        sparsity: float,
        *,
        scope: UnitScope = "global",
        least: int = 1,
        round_to: int = 1,
    ) -> list[RemovedUnit]:
        """Do one of several steps of :meth:`prune`, which may prune no unit.

        Args:
            scores: As there.
            sparsity: As there.
            scope: As there.
            least: As there.
            round_to: As there.

        Raises:
            ConfigError: The count is impossible, or a score is not a number.
            ShapeError: Fewer experts would be open than each token takes.
        """
        check_whole("round_to", round_to)
        multiples = {group.name: group.unit_multiple(round_to) for group in self.groups}
        least = fewest_units(self.groups, least)
        keep = self.keep
        check_covers("scores", scores, keep)
        refuse_nan_scores(scores)
        compared = {
            group.name: group.comparable(scores[group.name], keep[group.name])
            for group in self.groups
        }
        lowest = select_units(
            compared, keep, sparsity, scope=scope, least=least, multiples=multiples
        )
        names = [group.name for group in self.groups]
        chosen = [
            each._replace(score=float(scores[names[each.layer]][each.unit])) for each in lowest
        ]
        pruned = Counter(layer for layer, *_ in chosen)
        for layer, group in enumerate(self.groups):
            group.check_left(int(self.gates[group.name].keep.sum()) - pruned[layer])
        self._remember()
        for layer, unit, _ in chosen:
            self._gate(layer, unit).keep[unit] = False
        return chosen

    def prune_in_steps(
        self,
        ranker: Ranker,
        data: Data | None,
        sparsity: float,
        *,
        steps: int,
        scope: UnitScope = "global",
        least: int = 1,
    ) -> list[RemovedUnit]:
        """Prune in several steps, with new scores in each.

        Two units with the same function each look useless while the other one is open. With as
        many steps as pruned units this is the greedy search. One ``undo`` reverts all steps; if one
        step fails, none is done.

        Args:
            ranker: The ranker.
            data: Token ids [N, T] or batches.
            sparsity: Fraction of all units that is pruned afterwards.
            steps: Number of steps; the sparsity rises linearly.
            scope: "global" or "layer".
            least: As in :meth:`prune`.

        Raises:
            ConfigError: ``steps`` is below 1, or as in :meth:`score` and :meth:`prune`.
        """
        check_whole("steps", steps)
        start = self.closed / self.units
        parts = [linear_schedule(step, steps, sparsity, start) for step in range(1, steps + 1)]
        depth, removed = len(self._history), []
        try:
            for part in parts:
                scores = self.score(ranker, data)
                removed += self.close_lowest(scores, part, scope=scope, least=least)
            self._check_some_pruned(sparsity)
        except PrunekitError:
            while len(self._history) > depth:
                self.undo()
            raise
        del self._history[depth + 1 :]
        return removed

    def redundancy(self, data: Data) -> dict[str, Float[Tensor, "U U"]]:
        """Return the similarity of each pair of units, by group."""
        with eval_mode(self.model):
            grams = reader_grams(self._gated_model(to_batches(data, self.model)))
        return {group.name: redundancy(group, grams[group.name]) for group in self.linear_groups}

    def _check_sharded(self, batches: list[Batch], ranks: Ranks) -> None:
        """Refuse batches or weights that sharding by FSDP rules out."""
        if is_flattened(self.model):
            raise ConfigError(
                "score: FSDP 1 and ZeRO-3 keep weights in flat tensors, in which those of a unit "
                "cannot be found. Use FSDP 2 (fully_shard) or DDP, or score before the model is "
                "sharded."
            )
        if is_sharded(self.model):
            counts = ranks.all_gather_object(len(batches))
            if len({*counts}) > 1:
                raise ConfigError(
                    f"data: the processes have {' and '.join(map(str, counts))} batches, and under "
                    "FSDP all run the model equally often. Give each the same number."
                )

    def _ranker(self, ranker: str | Ranker, settings: dict[str, Any]) -> Ranker:
        """Return a ranker that ranks units of this kind."""
        chosen = _ranker(ranker, settings)
        for component in chosen.components:
            if self.kind not in component.kinds:
                ranked = " and ".join(sorted(component.kinds))
                raise ConfigError(f"ranker {component.name}: it ranks {ranked}, not {self.kind}.")
        return chosen

    def _check_some_pruned(self, sparsity: float) -> None:
        check_some_pruned("sparsity", sparsity, self.units, self.kind, self.closed)

    def _gated_model(self, found: Sequence[Batch]) -> GatedModel:
        # A ranker states the kinds that it ranks and uses only members that all of these have.
        groups = cast("list[LinearUnitGroup]", self.groups)
        return GatedModel(self.model, groups, self.gates, found)


def _ranker(ranker: str | Ranker, settings: dict[str, Any]) -> Ranker:
    """Return a ranker given by itself or by its name and settings."""
    if isinstance(ranker, Ranker):
        return ranker
    known = rankers()
    if not isinstance(ranker, str) or ranker not in known:
        raise ConfigError(f"ranker: {ranker!r} is none. Choose: {', '.join(known)}.")
    try:
        return known[ranker](**settings)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigError(f"ranker {ranker}: {'; '.join(lines)}") from None
