"""Adapters that prune and grow, within a run."""

from collections.abc import Generator, Sequence

from prunekit.config.apt_table import Apt
from prunekit.runs.record import Record
from prunekit.runs.structured.ranking import DenseUnits, UnitRanking
from prunekit.runs.training import Texts, recorded_steps
from prunekit.runs.training_log import Row, TrainingLog
from prunekit.structured.finalize import Finalized
from prunekit.structured.unit_gates import Gates
from prunekit.training.apt.loop import apt
from prunekit.training.apt.pruner import AptPruner
from prunekit.training.recover import TrainingStep


def train_adapters(
    ranking: UnitRanking, every: Sequence[Gates], dense: DenseUnits, texts: Texts, log: TrainingLog
) -> Generator[Record, None, tuple[list[Finalized], list[Row]]]:
    """Train adapters that prune the model; return removals and recorded steps.

    Args:
        ranking: The ranking of the model's units, in float32.
        every: Gates on all units, which are closed.
        dense: Scores of the dense model.
        texts: Training and held-out batches.
        log: Stores the recorded steps and the state.
    """
    plan, pruners = ranking.plan, list[AptPruner]()
    settings, distill = plan.training, plan.config.distill
    assert isinstance(settings, Apt)
    ranking.describe(every, dense)
    training = apt(ranking.model, *texts, settings, distill=distill, ranks=plan.ranks, log=log)

    def steps() -> Generator[TrainingStep, None, None]:
        pruners.append((yield from training))

    rows = yield from recorded_steps(plan, steps(), log)
    (pruner,) = pruners
    ranking.keep(pruner.kept)
    return [*pruner.finalized.values()], rows
