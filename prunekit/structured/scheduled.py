"""Pruning on a schedule while an optimizer trains a model: the engine.

Subclasses prune single weights or units.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunekit.allocations.schedules import PruneSchedule
from prunekit.errors import ConfigError
from prunekit.structured.frozen_units import HookHandles


class ScheduledPruner(HookHandles, ABC):
    """Prunes a model while an optimizer trains it; in force until ``remove()``.

    A step is a step of the optimizer: accumulated batches are one, and steps that a GradScaler
    skips are none. The model is pruned after the steps that the schedule names; at step 0, before
    the first forward with gradients.

    Attributes:
        schedule: The sparsity over the steps.
        step: Steps done.
        regrow: Fraction of what is pruned that returns at a regrowth; as much is pruned instead.
        regrow_every: Steps between two regrowths, which lie between start and end of the schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: PruneSchedule,
        regrow: float = 0.0,
        regrow_every: int | None = None,
    ) -> None:
        """Check the settings and follow the optimizer.

        Args:
            model: The model whose forward starts the training.
            optimizer: The optimizer whose steps count.
            schedule: The sparsity over the steps.
            regrow: See the class.
            regrow_every: See the class; needed if ``regrow`` is above 0.

        Raises:
            ConfigError: A value is invalid, or the optimizer is none of torch.
        """
        if not 0 <= regrow < 1:
            raise ConfigError(f"regrow: {regrow!r} is not a fraction from 0 up to 1.")
        if bool(regrow) != (regrow_every is not None):
            raise ConfigError("regrow and regrow_every: pass both or none.")
        if regrow_every is not None and (type(regrow_every) is not int or regrow_every < 1):
            raise ConfigError(
                f"regrow_every: {regrow_every!r} is not a whole number of at least 1."
            )
        self.optimizer = torch_optimizer(optimizer)
        self.schedule, self.regrow, self.regrow_every = schedule, regrow, regrow_every
        self.step, self._started = 0, False
        super().__init__(
            [
                # Before the hooks of FSDP, which gather weights.
                model.register_forward_pre_hook(FirstForward(self, model), prepend=True),
                self.optimizer.register_step_pre_hook(lambda *_: self._before_step()),
                self.optimizer.register_step_post_hook(lambda *_: self._after_step()),
            ]
        )

    @property
    def sparsity(self) -> float:
        """The sparsity that is asked for now."""
        return self.schedule.sparsity(self.step) if self._started else 0.0

    @property
    @abstractmethod
    def achieved(self) -> float:
        """The sparsity counted in the model's tensors."""

    @property
    def due(self) -> tuple[int, ...]:
        """The steps still to come at which the sparsity changes."""
        after = self.step if self._started else -1
        return tuple(step for step in self.schedule.due if step > after)

    @property
    def details(self) -> dict[str, Any]:
        """Further facts of now, for the records of a training: none."""
        return {}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters whose values it changes, by name: none."""
        return {}

    @property
    def done(self) -> bool:
        """Whether the schedule has ended with its exact count."""
        return self._started and self.step >= self.schedule.end and self._is_exact()

    @abstractmethod
    def _is_exact(self) -> bool:
        """Return whether exactly as many are pruned as the schedule asks now."""

    @abstractmethod
    def _prune(self, sparsity: float) -> None:
        """Prune to a sparsity; nothing that is pruned returns."""

    @abstractmethod
    def _regrow(self) -> None:
        """Let a share of the pruned return, and prune as many."""

    def _before_step(self) -> None:
        """Begin with the first step, where no forward of the model did."""
        self.begin()

    def begin(self) -> None:
        """Prune if that is due at step 0, unless it was done."""
        if not self._started:
            self._started = True
            if self.schedule.is_due(self.step):
                self._prune(self.schedule.sparsity(self.step))

    def _after_step(self) -> None:
        if step_was_skipped(self.optimizer):
            return
        self.step += 1
        if self.schedule.is_due(self.step):
            self._prune(self.schedule.sparsity(self.step))
        elif self._regrows_at(self.step):
            self._regrow()

    def _regrows_at(self, step: int) -> bool:
        inside = self.schedule.start < step < self.schedule.end
        return bool(self.regrow_every and inside and step % self.regrow_every == 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: numbers, and tensors of the subclass."""
        return {"step": self.step, "started": self._started, "settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ConfigError: It is of a pruner with other settings.
        """
        mine, theirs = self._settings(), state.get("settings")
        if theirs != mine:
            raise ConfigError(
                f"load_state_dict: the state is of a pruner with the settings {theirs}, this one "
                f"has {mine}. Use the settings with which training began."
            )
        self.step, self._started = int(state["step"]), bool(state["started"])

    def _settings(self) -> dict[str, Any]:
        """Return the settings that have to be those of a loaded state."""
        named = ("name", "final", "start", "end", "every", "initial")
        values = {name: getattr(self.schedule, name) for name in named}
        return values | {"regrow": self.regrow, "regrow_every": self.regrow_every}


class FirstForward:
    """Forward hook that begins a schedule, of this model alone."""

    def __init__(self, pruner: ScheduledPruner, model: nn.Module) -> None:
        self._pruner: Callable[[], ScheduledPruner | None] = weakref.ref(pruner)
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)

    def __call__(self, model: nn.Module, _: object) -> None:
        """Begin, if gradients are recorded and nothing is compiled."""
        if torch.compiler.is_compiling():
            return
        pruner = self._pruner()
        if pruner and self._model() is model and torch.is_grad_enabled():
            pruner.begin()

    def __deepcopy__(self, memo: dict[int, object]) -> "FirstForward":
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _hook_of_nothing, ()


def _hook_of_nothing() -> FirstForward:
    hook = FirstForward.__new__(FirstForward)
    hook._pruner = hook._model = _nothing
    return hook


def _nothing() -> None:
    return None


def torch_optimizer(optimizer: object) -> Optimizer:
    """Return the optimizer of torch, without Accelerate's wrapper.

    Raises:
        ConfigError: It is no optimizer of torch.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"optimizer: a {type(optimizer).__name__} is not a torch.optim.Optimizer, so its steps "
            "cannot be followed."
        )
    return optimizer


def step_was_skipped(optimizer: Optimizer) -> bool:
    """Return whether a step changed nothing, since a gradient was not finite.

    A GradScaler does not call ``step`` then; a fused optimizer it calls, which skips the step.
    """
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.item())
