"""Options of pruning units on a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from prunekit.allocations.schedules import PruneSchedule
from prunekit.distributed.process_group import current_ranks
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError
from prunekit.structured.selection import UnitScope

if TYPE_CHECKING:
    from prunekit.structured.batches import Batch, Data
    from prunekit.structured.rankers import Ranker


@dataclass(frozen=True)
class UnitChoice:
    """How the units that are pruned are chosen; see ``Gates.prune``.

    Attributes:
        ranker: Scores the units; the lowest are pruned.
        data: Samples for the ranker; each rank has its own.
        scope: "global" or "layer".
        least: Units that every layer keeps.
        round_to: Every width made up by the kept units is rounded up to a multiple of this.
        ranks: Processes that train the same model.
        uniform: Score heads together that a stock config keeps in common, see ``share_scores``.
    """

    ranker: Ranker
    data: Data | None = None
    scope: UnitScope = "global"
    least: int = 1
    round_to: int = 1
    ranks: Ranks = SINGLE
    uniform: bool = False


class ScheduleOptions(TypedDict, total=False):
    """Options of ``Gates.during``.

    Attributes:
        schedule: one-shot, linear or cubic, which is the default.
        start: First step at which units are pruned; 0, the default, is before the first forward.
        every: Steps between two prunings, by default 1; ``end`` is one in any case.
        initial: Sparsity at ``start``, by default 0.
        scope: As in ``Gates.prune``, like the next two.
        least: Units that every layer keeps.
        round_to: Every width is rounded up to a multiple of this.
        uniform: Keep equally many units in every layer, and the same heads where layers share a
            position bias, so that a stock config can describe the model; the scope is "layer".
        regrow: Fraction of the pruned units that returns at a regrowth; as many are pruned.
        regrow_every: Steps between two regrowths, which lie between start and end.
        ranks: Processes that train the same model, with other data each; by default those of
            torch's process group, if there is one.
        settings: Settings of a ranker given by name.
    """

    schedule: str
    start: int
    every: int
    initial: float
    scope: UnitScope
    least: int
    round_to: int
    uniform: bool
    regrow: float
    regrow_every: int | None
    ranks: Ranks | None
    settings: Mapping[str, Any]


def schedule_of(sparsity: float, end: int, options: ScheduleOptions) -> PruneSchedule:
    """Return the schedule that options describe.

    Args:
        sparsity: Sparsity at the end.
        end: Last step at which units are pruned.
        options: All options.

    Raises:
        ConfigError: An option is unknown, or a value invalid.
    """
    known = ScheduleOptions.__annotations__
    if unknown := [key for key in options if key not in known]:
        raise ConfigError(f"{unknown[0]}: no such option; there are {', '.join(known)}.")
    return PruneSchedule(
        options.get("schedule", "cubic"),
        sparsity,
        end,
        options.get("start", 0),
        options.get("every", 1),
        options.get("initial", 0.0),
    )


def choice_of(ranker: Ranker, batches: list[Batch], options: ScheduleOptions) -> UnitChoice:
    """Return how units are chosen, as options describe it.

    Args:
        ranker: Scores the units.
        batches: Samples for it.
        options: All options.
    """
    uniform = options.get("uniform", False)
    return UnitChoice(
        ranker,
        batches,
        options.get("scope", "layer" if uniform else "global"),
        options.get("least", 1),
        options.get("round_to", 1),
        options.get("ranks") or current_ranks(),
        uniform,
    )
