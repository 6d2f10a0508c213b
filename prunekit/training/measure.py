"""Measurement of a model in training: records, and the best weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.config.train_table import Training
from prunekit.distributed.ranks import Ranks
from prunekit.errors import ConfigError
from prunekit.structured.batches import Batch, mean_loss
from prunekit.structured.unit_gates import Gates
from prunekit.training.best_checkpoint import BestCheckpoint
from prunekit.training.data_parallel import StepLosses, check_equal
from prunekit.training.distill import Distiller

FINAL_RATE = 0.1
"""Learning rate of the last step, as a fraction of the highest."""


class Pruning(Protocol):
    """Pruning in force during training, such as a :class:`GradualPruner`."""

    @property
    def sparsity(self) -> float:
        """The sparsity that is asked for now."""
        ...

    @property
    def achieved(self) -> float:
        """The sparsity counted in the tensors."""
        ...

    @property
    def done(self) -> bool:
        """Whether the schedule has ended, and its sparsity is the one counted."""
        ...

    @property
    def details(self) -> Mapping[str, Any]:
        """Further facts of now for the records."""
        ...

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        """The parameters whose values it changes, by name."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state besides these weights: a tree with tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, with the weights of its step."""
        ...


@dataclass(frozen=True)
class TrainingStep:
    """Record of a training step.

    Attributes:
        step: Number of steps done.
        loss: Mean training loss per prediction of this step; None before the first.
        held_out: Mean held-out loss; None if it was not measured at this step.
        factors: Gate factor of each unit, by unit group; empty without gates.
        rate: Learning rate of this step; None before the first.
        sparsity: Sparsity that the pruning in force asks for; None without one.
        achieved: Sparsity that was counted; None without pruning in force.
        done: Whether no pruning is to come, so that these weights could be the best.
        distillation: Losses of distillation of this step, by name; empty without it.
        details: Further facts of the pruning in force.
    """

    step: int
    loss: float | None
    held_out: float | None
    factors: dict[str, list[float]]
    rate: float | None = None
    sparsity: float | None = None
    achieved: float | None = None
    done: bool = True
    distillation: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Measure:
    """Measures a model in training, and stores the best weights.

    Attributes:
        model: The model.
        validation: Held-out batches of this rank.
        settings: Settings of the training.
        gates: Gates whose factors are recorded.
        pruning: The pruning in force.
        ranks: Processes with the same weights.
        distiller: The distillation in force; it learns of each held-out loss.
        best: The best weights so far.
    """

    model: PreTrainedModel
    validation: Sequence[Batch]
    settings: Training
    gates: Sequence[Gates]
    pruning: Pruning | None
    ranks: Ranks
    distiller: Distiller | None = None

    def __post_init__(self) -> None:
        # Pruning may replace the weights, so that they are listed when they are stored.
        self.best = BestCheckpoint(lambda: [*trained_weights(self.model, self.gates).values()])

    def record(
        self, step: int, losses: StepLosses | None = None, *, is_measured: bool
    ) -> TrainingStep:
        """Return the record of a step; with ``is_measured`` measure the held-out loss."""
        pruning, held_out = self.pruning, None
        done = pruning is None or pruning.done
        if is_measured:
            weights = trained_weights(self.model, self.gates)
            if self.distiller:
                weights |= self.distiller.transformations.named_parameters()
            check_equal(weights, {}, self.ranks, step)
            held_out = mean_loss(self.model, self.validation, self.ranks)
            if self.distiller:
                self.distiller.measured(held_out)
            if done:
                self.best.update(held_out)
        return TrainingStep(
            step,
            losses.loss if losses else None,
            held_out,
            factors={
                name: gate.factor.detach().tolist()
                for each in self.gates
                for name, gate in each.gates.items()
            },
            rate=learning_rate(step, self.settings) if step else None,
            sparsity=pruning.sparsity if pruning else None,
            achieved=pruning.achieved if pruning else None,
            done=done,
            distillation=losses.parts if losses else {},
            details=pruning.details if pruning else {},
        )

    def changed_weights(self) -> dict[str, Tensor]:
        """Return all parameters and gate values that the training changes, by name."""
        changed = trained_weights(self.model, self.gates)
        pruned = self.pruning.weights if self.pruning else {}
        frozen = {name: each for name, each in pruned.items() if not each.requires_grad}
        return changed | {f"pruned {name}": each for name, each in frozen.items()}

    def restore_best(self) -> None:
        """Restore the best weights after the last step.

        Raises:
            ConfigError: Pruning was not done when a held-out loss was measured.
        """
        if self.pruning and not self.pruning.done:
            raise ConfigError(
                f"{self.settings.table}.steps: after {self.settings.steps} steps the sparsity is "
                f"{self.pruning.achieved:.6g}, {self.pruning.sparsity:.6g} is due by now, and the "
                "schedule has not ended. Train for more steps, or end the schedule earlier."
            )
        self.best.restore()


def trained_weights(model: PreTrainedModel, gates: Sequence[Gates]) -> dict[str, Tensor]:
    """Return the parameters and gate values that are trained, by name."""
    values = ((f"gate {name}", gate.value) for each in gates for name, gate in each.gates.items())
    named = (*model.named_parameters(), *values)
    return {name: each for name, each in named if each.requires_grad}


def learning_rate(step: int, settings: Training) -> float:
    """Return the learning rate of a step, counted from 1.

    It rises linearly over a tenth of the steps, at most 100, and then falls along a cosine.
    """
    warmup = max(1, min(100, settings.steps // 10))
    if step <= warmup:
        return settings.rate * step / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return settings.rate * (FINAL_RATE + (1 - FINAL_RATE) * cosine)
