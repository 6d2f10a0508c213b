"""Gates that close on a schedule while the model is trained."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from prunekit.runs.distillation import teacher_of
from prunekit.runs.record import Record
from prunekit.runs.structured.ranking import UnitRanking
from prunekit.runs.training import Texts, adapted, train_model
from prunekit.runs.training_log import Row, TrainingLog
from prunekit.structured.gradual_units import GradualUnits
from prunekit.structured.unit_gates import Gates


def prune_while_training(
    ranking: UnitRanking, every: Sequence[Gates], texts: Texts, log: TrainingLog
) -> Generator[Record, None, list[Row]]:
    """Train a model while gates close; return the recorded steps.

    Args:
        ranking: The ranking of the model's units, in float32.
        every: Gates on all units, which are closed.
        texts: Training and held-out batches.
        log: Stores the recorded steps and the state.
    """

    @contextmanager
    def during(optimizer: Optimizer) -> Iterator[UnitPruners]:
        train, sharded = ranking.plan.config.train, ranking.plan.sharded
        # A sharded optimizer has parts, whose training has ended when units are removed.
        if train and not train.adapter and not sharded:
            ranking.optimizers.append(optimizer)
        with ExitStack() as stack:
            pruners = [stack.enter_context(_pruner(ranking, each, optimizer)) for each in every]
            yield UnitPruners(pruners)

    with adapted(ranking.plan, ranking.model) as trained:
        teacher = teacher_of(ranking.plan, trained, every)
        return (yield from train_model(ranking.plan, trained, texts, log, during, teacher))


def _pruner(ranking: UnitRanking, gates: Gates, optimizer: Optimizer) -> GradualUnits:
    """Return the pruner of one kind of units, in force."""
    prune = ranking.plan.config.prune
    schedule = prune.gradual
    assert schedule is not None
    return gates.during(
        optimizer,
        prune.method,
        [*ranking.scorer.batches] or None,
        sparsity=schedule.final,
        end=schedule.end,
        schedule=schedule.name,
        start=schedule.start,
        every=schedule.every,
        initial=schedule.initial,
        scope=prune.scope,
        least=prune.least,
        round_to=prune.round_to,
        uniform=prune.uniform,
        regrow=prune.regrow,
        regrow_every=prune.regrowth_interval,
        ranks=ranking.plan.ranks,
    )


@dataclass(frozen=True)
class UnitPruners:
    """Pruners of several kinds of units, with one schedule.

    Attributes:
        pruners: The pruner of each kind, in force.
    """

    pruners: Sequence[GradualUnits]

    @property
    def sparsity(self) -> float:
        """The sparsity of each kind that is asked for now."""
        return self.pruners[0].sparsity

    @property
    def achieved(self) -> float:
        """Fraction of the units of all kinds whose gates are closed, counted."""
        gates = [pruner.gates for pruner in self.pruners]
        return sum(each.closed for each in gates) / sum(each.units for each in gates)

    @property
    def details(self) -> dict[str, Any]:
        """Further facts of now: none."""
        return {}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters whose values they change: none."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each pruner."""
        return {"pruners": [pruner.state_dict() for pruner in self.pruners]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, with the weights of its step."""
        for pruner, each in zip(self.pruners, state["pruners"], strict=True):
            pruner.load_state_dict(each)

    @property
    def done(self) -> bool:
        """Whether all schedules have ended with their exact counts."""
        return all(pruner.done for pruner in self.pruners)
