"""Ranks units and closes the gates of the lowest, step by step."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

from torch.optim import Optimizer
from transformers import PreTrainedModel

from prunekit.allocations.schedules import SCHEDULES, Schedule
from prunekit.formatting import percent
from prunekit.models.units.kinds import WHOLE, Kind
from prunekit.runs.record import Record
from prunekit.runs.stage import Stage
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.structured.planner import budget_constraints
from prunekit.runs.structured.result import layer_entries, mark_kept_heads, view_heads
from prunekit.runs.structured.unit_scorer import UnitScorer
from prunekit.runs.structured.unit_scores import (
    best_token_counter,
    raise_scores,
)
from prunekit.structured.agreement import spearman
from prunekit.structured.finalize import Finalized
from prunekit.structured.parameter_budget import select_within_budget
from prunekit.structured.rankers import Scores
from prunekit.structured.selection import check_some_pruned
from prunekit.structured.shared_scores import share_scores
from prunekit.structured.unit_gates import Gates

Ranked = tuple[list[Gates], list[Finalized]]
"""Closed gates on heads and neurons, and the results for the kinds that are removed already."""


class DenseUnits(NamedTuple):
    """Scores and attention entropies of the dense model, by kind."""

    scores: dict[Kind, Scores]
    entropies: dict[Kind, dict[str, list[float]]]


class UnitRanking:
    """Ranking of the units of one model.

    Heads and neurons are only gated, and removed by the caller; blocks, hidden dimensions and
    experts are removed as soon as they are ranked.

    Attributes:
        entries: Report entry of each unit group, by its name.
        views: Attention maps of a few heads, for the report; None where there are none.
        agreement: Spearman's ρ of scores and leave-one-out, by kind, where ``prune.truth`` is set.
        optimizers: Optimizers that trained the model, whose weights have to be replaced in them.
    """

    def __init__(
        self,
        plan: StructuredPlan,
        scorer: UnitScorer,
        stack: ExitStack,
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """Prepare a ranking; nothing is measured yet.

        Args:
            plan: The plan of the run.
            scorer: Measures the units of the model.
            stack: Detaches the gates at its end.
            timed: Returns a context manager that adds its time to a phase of the run.
        """
        self.plan, self.scorer, self.stack, self.timed = plan, scorer, stack, timed
        self.entries: dict[str, dict[str, Any]] = {}
        self.views: dict[str, Any] | None = None
        self.agreement: dict[Kind, float] = {}
        self.optimizers: list[Optimizer] = []
        self._truths: dict[Kind, Scores] = {}

    @property
    def model(self) -> PreTrainedModel:
        """The model as it is now."""
        return self.scorer.model

    def rank(self) -> Generator[Record, None, Ranked]:
        """Rank all units and close the gates of those that are removed."""
        if self.plan.config.prune.parameters is None:
            return (yield from self._rank_in_turn())
        return (yield from self._rank_together())

    def _rank_in_turn(self) -> Generator[Record, None, Ranked]:
        """Remove a fraction of each kind, one kind after the other."""
        prune = self.plan.config.prune
        gates: list[Gates] = []
        done: list[Finalized] = []
        for kind in prune.pattern:
            each = self.stack.enter_context(self.scorer.gates(kind))
            steps, schedule = self._steps(each)
            yield Record("phase", f"rank {kind}", {"steps": steps}, Stage.SCORING)
            entropies = self._entropies(each)
            first: Scores = {}
            for step in range(1, steps + 1):
                with self.timed("prune"):
                    scores = self._score(each)
                    if not first:
                        self._inspect(each, scores)
                    first = first or scores
                    part = schedule(step, steps, prune.sparsity or 0.0, prune.initial_sparsity)
                    each.close_lowest(
                        scores, part, scope=prune.scope, least=prune.least, round_to=prune.round_to
                    )
                yield Record("step", f"{percent(part)} of {kind}")
            self._mark_kept_heads(each)
            units = sum(place.units for place in each.groups)
            pruned = units - sum(map(len, each.kept.values()))
            check_some_pruned("prune.sparsity", prune.sparsity or 0.0, units, kind, pruned)
            self.entries |= layer_entries(each, first, entropies, self._truths.get(kind))
            self._collect(each, gates, done)
        return gates, done

    def _rank_together(self) -> Generator[Record, None, Ranked]:
        """Close gates of all kinds until the model meets its parameter budget."""
        prune, every = self.plan.config.prune, self.gate_all()
        steps, schedule = prune.steps if prune.steps != "each" else 1, SCHEDULES[prune.schedule]
        yield Record(
            "phase", f"rank {' and '.join(prune.pattern)}", {"steps": steps}, Stage.SCORING
        )
        removed, initial = 1 - (prune.parameters or 0.0), prune.initial_sparsity
        dense = self.measure(every)
        for step in range(1, steps + 1):
            with self.timed("prune"):
                scores: dict[Kind, Scores] = dense.scores
                if step > 1:
                    scores = {each.kind: self._score(each) for each in every}
                part = 1 - schedule(step, steps, removed, initial)
                self._close_to_budget(every, scores, part)
            yield Record("step", f"{percent(part)} of the parameters")
        return self.settle(every, dense)

    def gate_all(self) -> list[Gates]:
        """Attach gates to the units of all kinds that are removed."""
        kinds = self.plan.config.prune.pattern
        return [self.stack.enter_context(self.scorer.gates(kind)) for kind in kinds]

    def measure(self, every: Sequence[Gates]) -> "DenseUnits":
        """Measure the units of the dense model, for the report."""
        entropies: dict[Kind, dict[str, list[float]]] = {
            each.kind: self._entropies(each) for each in every
        }
        with self.timed("prune"):
            scores: dict[Kind, Scores] = {each.kind: self._score(each) for each in every}
            for each in every:
                self._inspect(each, scores[each.kind])
        return DenseUnits(scores, entropies)

    def describe(self, every: Sequence[Gates], dense: "DenseUnits") -> None:
        """Make the entries of the dense model's units."""
        for each in every:
            self.entries |= layer_entries(
                each,
                dense.scores[each.kind],
                dense.entropies[each.kind],
                self._truths.get(each.kind),
            )

    def keep(self, kept: Mapping[str, Sequence[int]]) -> None:
        """Record the units left, numbered as in the dense model."""
        for name, units in kept.items():
            entry = self.entries[name]
            entry["kept"] = [*units]
            entry["sparsity"] = 1 - len(units) / entry["units"]
        for head in (self.views or {}).get("heads", ()):
            head["kept"] = head["unit"] in kept.get(head["layer"], ())

    def settle(self, every: Sequence[Gates], dense: "DenseUnits") -> Ranked:
        """Record the closed units; remove those of blocks and hidden dimensions."""
        gates: list[Gates] = []
        done: list[Finalized] = []
        for each in every:
            self._mark_kept_heads(each)  # before blocks that are removed change the names
            names = each.relocate()
            scores, measured = dense.scores[each.kind], dense.entropies[each.kind]
            truth = self._truths.get(each.kind)
            self.entries |= layer_entries(
                each,
                {name: scores[old] for name, old in names.items()},
                {name: measured.get(old) for name, old in names.items()},
                truth and {name: truth[old] for name, old in names.items()},
            )
            self._collect(each, gates, done)
        return gates, done

    def _close_to_budget(
        self, every: Sequence[Gates], scores: Mapping[Kind, Scores], part: float
    ) -> None:
        """Close gates until at most ``part`` of the parameters are left."""
        places = [place for each in every for place in each.groups]
        merged = {name: score for kind in scores.values() for name, score in kind.items()}
        keep = {name: units for each in every for name, units in each.keep.items()}
        budget = budget_constraints(self.plan, self.model, part)
        kept = select_within_budget(places, merged, keep, self.plan.counted_parameters, budget)
        for each in every:
            each.close(kept)

    def _inspect(self, gates: Gates, scores: Scores) -> None:
        """Measure head views and agreement of the dense model for the report."""
        if gates.kind == "heads" and self.scorer.batches and self.plan.ranks.is_main:
            self.views = view_heads(gates, scores, self.scorer, self.plan.tokenizer)
        if self.plan.config.prune.truth:
            truth = self.scorer.truth(gates)
            self._truths[gates.kind] = truth
            self.agreement[gates.kind] = spearman(scores, truth)

    def _mark_kept_heads(self, gates: Gates) -> None:
        if gates.kind == "heads" and self.views:
            mark_kept_heads(self.views, gates)

    def _collect(self, gates: Gates, kept: list[Gates], done: list[Finalized]) -> None:
        """Remove blocks, hidden dimensions and experts; keep gates of other kinds."""
        if gates.kind not in WHOLE:
            kept.append(gates)
            return
        with self.timed("prune"):
            done.append(self.finalize(gates))
        gates.detach()
        self.scorer.remove(gates.kind, done[-1].kept)

    def finalize(self, gates: Gates) -> Finalized:
        """Remove the units whose gates are closed."""
        stock = self.plan.config.prune.uniform
        return gates.finalize(stock=stock, optimizer=self.optimizers or None)

    def _score(self, gates: Gates) -> Scores:
        prune = self.plan.config.prune
        scores = self.scorer.score(gates, prune.method)
        scores = raise_scores(scores, self.plan.fixed)
        if gates.kind == "blocks":
            scores = raise_scores(scores, best_token_counter(gates, scores))
        return share_scores(gates.linear_groups, scores) if prune.uniform else scores

    def _steps(self, gates: Gates) -> tuple[int, Schedule]:
        """Return the number of steps and their sparsity schedule."""
        prune = self.plan.config.prune
        if prune.steps != "each":
            return prune.steps, SCHEDULES[prune.schedule]
        units = [place.units for place in gates.groups]
        most = max(units) if prune.scope == "layer" else sum(units)
        return max(1, int((prune.sparsity or 0.0) * most + 0.5)), SCHEDULES["linear"]

    def _entropies(self, gates: Gates) -> dict[str, list[float]]:
        """Return the attention entropy of each head over the highest possible one."""
        if gates.kind != "heads" or not self.scorer.batches:
            return {}
        with self.timed("calibrate"):
            measured = self.scorer.entropies(gates)
        return {
            name: (sums.entropy / sums.log_keys.clamp_min(1e-12)).tolist()
            for name, sums in measured.items()
        }
