"""Windows in which gates of heads, neurons and coordinates close.

    step ─ warmup ─┬─ window 1 ─┬─ window 2 ─┬ … ┬─ end ─ training of the smaller model
                   choose       remove, grow, choose

Shapes: U units of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunekit.structured.frozen_units import HookHandles
from prunekit.structured.gate_file import GateState
from prunekit.structured.optimizers import replace_parameters
from prunekit.structured.scheduled import step_was_skipped, torch_optimizer
from prunekit.training.apt.budget import WindowBudget
from prunekit.training.apt.growth import adapter_parameters, grow, grown_ranks, ranks_of
from prunekit.training.apt.salience import RunningMean, StepSalience

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from prunekit.config.apt_table import Apt
    from prunekit.distributed.ranks import Ranks
    from prunekit.models.units.base import UnitGroup
    from prunekit.models.units.kinds import Kind
    from prunekit.structured.finalize import Finalized
    from prunekit.structured.parameter_budget import Keep
    from prunekit.structured.unit_gates import Gates


class AptPruner(HookHandles):
    """Prunes units and grows adapters while an optimizer trains these.

    Attributes:
        step: Steps done.
        window: Windows that ended.
        gates: Gates of each kind of units.
        optimizer: The optimizer whose steps count.
        kept: The units left, by their numbers in the dense model, by group name.
        finalized: The last removal of each kind.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        gates: Sequence[Gates],
        optimizer: Optimizer,
        settings: Apt,
        ranks: Ranks,
        *,
        cuts: bool = True,
    ) -> None:
        """Check the budget and follow the optimizer.

        Args:
            model: The model with its adapters.
            gates: Gates of each kind, all open.
            optimizer: The optimizer that trains the adapters.
            settings: The windows and the budget.
            ranks: Processes that share every batch.
            cuts: Remove units from the matrices at the end of each window; otherwise their gates
                remain closed.

        Raises:
            ConfigError: The budget cannot be met.
        """
        self.gates, self.optimizer = gates, torch_optimizer(optimizer)
        self.step = self.window = 0
        self._model, self._settings, self._ranks, self._cuts = model, settings, ranks, cuts
        self.kept = {name: [*range(len(mask))] for name, mask in self._keep().items()}
        self.finalized: dict[Kind, Finalized] = {}
        self._salience = RunningMean(settings.ema)
        self._importance = RunningMean(settings.ema)
        self._budget = WindowBudget(model, settings)
        self._adapter_size = _size(self._matrices())
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._target: Keep = {}
        self._removals: list[Keep] = []
        self._budget.check(self.groups, self._keep())
        self._attach()
        super().__init__(
            [
                self.optimizer.register_step_pre_hook(lambda *_: self._before_step()),
                self.optimizer.register_step_post_hook(lambda *_: self._after_step()),
            ]
        )

    @property
    def groups(self) -> list[UnitGroup]:
        """The groups of all kinds."""
        return [group for each in self.gates for group in each.groups]

    @property
    def remaining(self) -> int:
        """Parameters of those counted that the model keeps, with closed gates removed."""
        return self._budget.remaining(self.groups, self._keep())

    @property
    def sparsity(self) -> float:
        """Fraction of the counted parameters that was to be removed by now."""
        return 1 - self._settings.budget(self.window)

    @property
    def achieved(self) -> float:
        """Fraction of the counted parameters that was removed, counted."""
        return 1 - self.remaining / self._budget.first

    @property
    def done(self) -> bool:
        """Whether the last window has ended."""
        return self.window == self._settings.windows

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters whose values it changes: none."""
        return {}

    @property
    def details(self) -> dict[str, Any]:
        """Ranks of the adapters, kept units and parameters, for the records."""
        ranks = [*ranks_of(self._model).values()]
        mean = sum(ranks) / len(ranks)
        return {
            "ranks": {"smallest": min(ranks), "mean": mean, "largest": max(ranks)},
            "units": {each.kind: each.units - each.closed for each in self.gates},
            "parameters": self.remaining,
        }

    def remove(self) -> None:
        """Remove all hooks; the gates remain."""
        super().remove()
        self._hooks.remove()

    def _attach(self) -> None:
        """Observe the groups as they are now."""
        for gate in self._every_gate().values():
            # So that units have a gradient where no adapter comes before them.
            gate.value.requires_grad_()
        self._hooks = StepSalience(self._model, self.groups, outliers=self._settings.outliers)

    def _detach(self) -> None:
        """Observe no groups any more."""
        self._hooks.remove()
        for gate in self._every_gate().values():
            gate.value.requires_grad_(requires_grad=False)

    def _before_step(self) -> None:
        """Gather the salience of the step, while there are windows to come."""
        if self.done:
            return
        adapters = {each: each.grad for each in self._matrices() if each.grad is not None}
        self._salience.update(self._hooks.scores(adapters, self._ranks))
        self._importance.update(
            {
                name: (up.detach() * adapters[up]).abs().double().sum().cpu()
                for name, (_, up) in adapter_parameters(self._model).items()
                if up in adapters
            }
        )
        for gate in self._every_gate().values():
            gate.value.grad = None

    def _after_step(self) -> None:
        if step_was_skipped(self.optimizer):
            return
        self.step += 1
        settings = self._settings
        if self.step > settings.warmup and not self.done:
            self._move_gates()
            if (self.step - settings.warmup) % settings.window == 0:
                self._end_window()
        if self.step >= settings.warmup and not self.done and not self._target:
            self._target = self._budget.select(
                self.groups, self._salience.scores, self._keep(), self.window + 1
            )

    @torch.no_grad()
    def _move_gates(self) -> None:
        """Lower the gates of units to remove, raise the others."""
        for name, gate in self._every_gate().items():
            up = self._target[name].to(gate.value.device)
            change = torch.where(up, self._settings.decay, -self._settings.decay)
            gate.value.add_(change).clamp_(0, 1)

    @torch.no_grad()
    def _end_window(self) -> None:
        """Close or open all gates, remove the closed units, grow adapters."""
        self.open_left()
        self._close(self._target)
        if self._cuts:
            self._removals.append(self._target)
        self.window, self._target = self.window + 1, {}
        if self._cuts or self.done:
            self._detach()
        if self._cuts:
            self.cut()
            if not self.done:
                self._attach()
        self._grow()

    @torch.no_grad()
    def open_left(self) -> None:
        """Open the gates of all units that no window has closed."""
        for gate in self._every_gate().values():
            gate.value.fill_(1)

    def _close(self, keep: Keep) -> None:
        for name, gate in self._every_gate().items():
            gate.keep &= keep[name].to(gate.keep.device)

    def cut(self) -> None:
        """Remove the closed units from the matrices."""
        for each in self.gates:
            if each.closed:
                done = self.finalized[each.kind] = each.finalize(
                    stock=self._settings.uniform, optimizer=self.optimizer
                )
                self._salience.keep(done.kept)
                for name, kept in done.kept.items():
                    self.kept[name] = [self.kept[name][unit] for unit in kept]
        self._budget.recount()

    def _grow(self) -> None:
        """Grow the more important half of the adapters."""
        settings = self._settings
        share = self.window / settings.windows
        allowed = self._adapter_size * (1 + (settings.growth - 1) * share)
        ranks = ranks_of(self._model)
        importance = {name: float(self._importance.scores[name]) for name in ranks}
        factor = allowed / _size(self._matrices())
        self._set_ranks(grown_ranks(ranks, importance, factor, settings.most_rank))

    def _set_ranks(self, ranks: Mapping[str, int]) -> None:
        changes = grow(self._model, ranks, self._generator)
        replace_parameters(self.optimizer, changes, set())

    def state_dict(self) -> dict[str, Any]:
        """Return all that windows and steps have changed, besides trained weights."""
        return {
            "step": self.step,
            "window": self.window,
            "removals": self._removals,
            "ranks": ranks_of(self._model),
            "gates": {
                name: GateState.of(gate)._asdict() for name, gate in self._every_gate().items()
            },
            "target": self._target,
            "salience": self._salience.scores,
            "importance": self._importance.scores,
            "generator": self._generator.get_state(),
        }

    def rebuild(self, state: Mapping[str, Any]) -> None:
        """Give the model the shapes of a state: remove units, grow adapters.

        Units are removed window by window, since the rescaling of norms rounds at each.
        """
        self.step, self.window = state["step"], state["window"]
        self._detach()
        for keep in state["removals"]:
            self._close(keep)
            self._removals.append(keep)
            self.cut()
        ranks = ranks_of(self._model)
        self._set_ranks({name: rank for name, rank in state["ranks"].items() if rank > ranks[name]})
        if not self.done:
            self._attach()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, with the shapes and weights of its step."""
        for name, gate in self._every_gate().items():
            GateState(**state["gates"][name]).restore(gate)
        self._target = state["target"]
        self._salience.scores, self._importance.scores = state["salience"], state["importance"]
        self._generator.set_state(state["generator"])

    def _keep(self) -> dict[str, Tensor]:
        return {name: mask for each in self.gates for name, mask in each.keep.items()}

    def _every_gate(self) -> dict[str, Any]:
        return {name: gate for each in self.gates for name, gate in each.gates.items()}

    def _matrices(self) -> list[nn.Parameter]:
        """Return all matrices of adapters."""
        return [each for pair in adapter_parameters(self._model).values() for each in pair]


def _size(parameters: Sequence[nn.Parameter]) -> int:
    return sum(each.numel() for each in parameters)
