"""Gather the statistics of a block's linears over all ranks.

Shapes: T tokens, I input features.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

from prunekit.allocations import Allocation, Survey
from prunekit.errors import NumericsError
from prunekit.methods.layer import Layer
from prunekit.models import memory
from prunekit.models.experts import Expert
from prunekit.models.layout import Block, Linear, read_weight
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.patterns import Pattern
from prunekit.sparsify.observe import FiniteSamples, observe
from prunekit.sparsify.recipe import ExpertCoverage
from prunekit.statistics import CrossGram, StageStatistics, Statistic, merge, minimal_union

Stage = tuple[Sequence[Linear], StageStatistics]
"""Linears with the same input, and the statistics of that input."""


def gather_statistics(
    loaded: LoadedBlock,
    stages: Sequence[Sequence[Linear]],
    needs: Sequence[type[Statistic]],
    coverage: ExpertCoverage | None = None,
) -> Iterator[Stage]:
    """Gather the statistics of all stages in one forward, then yield them.

    Args:
        loaded: The block.
        stages: Linears, grouped by their common input.
        needs: Kinds of statistics to gather; without any the block does not run.
        coverage: Policy for experts with too few tokens; None to accept any count.

    Raises:
        NumericsError: An expert has too few tokens and the policy is "error"; or the input of a
            linear is NaN or inf in some sample, which on a GPU ``loaded.checks`` find.
    """
    found = [_empty(loaded, linears, needs) for linears in stages]
    finite = observe(loaded, stages, found) if needs and stages else FiniteSamples()
    gathered = _over_ranks(loaded, stages, found, finite, coverage)
    del found  # so that the caller can free the statistics of a stage
    yield from zip(stages, gathered, strict=True)


def gather_by_stage(
    loaded: LoadedBlock,
    stages: Sequence[Sequence[Linear]],
    needs: Sequence[type[Statistic]],
    coverage: ExpertCoverage | None = None,
    *,
    last: bool,
) -> Iterator[Stage]:
    """Yield each stage with statistics gathered after pruning earlier ones.

    Args:
        loaded: The block.
        stages: Linears, grouped by their common input, in run order; the caller prunes each before
            it asks for the next.
        needs: Kinds of statistics to gather.
        coverage: Policy for experts with too few tokens; None to accept any count.
        last: The block is not calibrated again, so the dense model advances to the next block
            during the last forward.
    """
    loaded.begin_stages([[linear.path for linear in linears] for linears in stages], fold=last)
    for number, linears in enumerate(stages, 1):
        found = [_empty(loaded, linears, needs)]
        memory.trim_heap()
        advances = last and number == len(stages)
        finite = observe(loaded, [linears], found, advance_dense=advances)
        memory.trim_heap()
        stats = _over_ranks(loaded, [linears], found, finite, coverage)[0]
        del found  # so that the caller can free the statistics
        yield linears, stats
        del stats  # before the next stage is observed
        loaded.settle_stage()
    memory.trim_heap()


def make_survey(
    iterate: Callable[[], Iterator[tuple[LoadedBlock, Block]]],
    allocation: Allocation,
    pattern: Pattern,
) -> Survey:
    """Return a function that iterates over the dense layers for an allocation.

    Args:
        iterate: Iterates over all blocks of the dense model.
        allocation: The allocation, which declares the statistics that it needs.
        pattern: The pattern of the run.
    """
    needs = minimal_union(allocation.needs)

    def survey() -> Iterator[list[Layer]]:
        for loaded, block in iterate():
            layers = [
                Layer(linear.name, read_weight(loaded.module, linear), stats, pattern, 0.0)
                for linears, stats in gather_statistics(loaded, block.pruned_stages, needs)
                for linear in linears
            ]
            loaded.checks.settle()
            yield layers

    return survey


def _empty(
    loaded: LoadedBlock, linears: Sequence[Linear], needs: Sequence[type[Statistic]]
) -> tuple[Statistic, ...]:
    # An expert's inputs in the dense model are of other tokens than in the pruned one.
    kinds = [kind for kind in needs if not (linears[0].expert and kind is CrossGram)]
    return tuple(kind(linears[0].inputs, loaded.device) for kind in kinds)


def _over_ranks(
    loaded: LoadedBlock,
    stages: Sequence[Sequence[Linear]],
    found: Sequence[tuple[Statistic, ...]],
    finite: FiniteSamples,
    coverage: ExpertCoverage | None,
) -> list[StageStatistics]:
    """Return the statistics of all ranks, applying the coverage policy."""
    for linears, statistics in zip(stages, found, strict=True):
        _merge(loaded, linears, statistics, finite)
    gathered = [
        StageStatistics(
            statistics,
            statistics[0].tokens if linears[0].expert and statistics else None,
            ranks=loaded.ranks,
        )
        for linears, statistics in zip(stages, found, strict=True)
    ]
    starved = [
        number
        for number, stats in enumerate(gathered)
        if coverage and stats.routed is not None and stats.routed < coverage.below
    ]
    if not coverage or not starved:
        return gathered
    if coverage.policy == "error":
        raise NumericsError(
            f"{stages[starved[0]][0].name}: {gathered[starved[0]].routed} tokens are routed to its "
            f"expert, fewer than the {coverage.below} of starved_below. Use more calibration text, "
            "or another policy in `starved`."
        )
    again = [found[number] for number in starved]
    if coverage.policy == "all-tokens":
        again = _of_all_tokens(loaded, [stages[number] for number in starved], again[0])
    for number, statistics in zip(starved, again, strict=True):
        routed = gathered[number].routed
        gathered[number] = StageStatistics(statistics, routed, coverage.policy, loaded.ranks)
    return gathered


def _of_all_tokens(
    loaded: LoadedBlock, stages: Sequence[Sequence[Linear]], like: Sequence[Statistic]
) -> list[tuple[Statistic, ...]]:
    """Return statistics of experts as if all tokens were routed to them.

    ``like``: statistics of the kinds to gather.
    """
    experts = [
        cast("Expert", loaded.module.get_submodule(str(linears[0].expert))) for linears in stages
    ]
    found = [_empty(loaded, linears, [*map(type, like)]) for linears in stages]
    for expert in experts:
        expert.reads_all = True
    finite = observe(loaded, stages, found)
    for expert in experts:
        expert.reads_all = False
    for linears, statistics in zip(stages, found, strict=True):
        _merge(loaded, linears, statistics, finite)
    return found


def _merge(
    loaded: LoadedBlock,
    linears: Sequence[Linear],
    statistics: tuple[Statistic, ...],
    finite: FiniteSamples,
) -> None:
    """Sum statistics over all ranks, in place, and refuse NaN and inf."""
    merge(statistics, loaded.ranks)
    for statistic in statistics:
        loaded.checks.require_none(
            statistic.finite().logical_not(),
            lambda _: NumericsError(finite.explain(linears[0], loaded.ranks)),
        )
