"""Units pruned on a schedule while a model is trained.

    heads = prunekit.heads(model)
    with heads.during(optimizer, "gradient", tokens, sparsity=0.5, end=1000, every=100):
        ...  # the training loop
    heads.finalize(optimizer=optimizer)

Shapes: U units of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor
from typing_extensions import override

from prunekit.structured.gate_file import GateState
from prunekit.structured.scheduled import ScheduledPruner
from prunekit.structured.selection import (
    check_covers,
    check_some_pruned,
    check_whole,
    fewest_units,
    select_units,
    unit_count,
)
from prunekit.structured.shared_scores import share_scores

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from prunekit.allocations.schedules import PruneSchedule
    from prunekit.structured.rankers import Ranker, Scores
    from prunekit.structured.scored_gates import ScoredGates
    from prunekit.structured.unit_choice import UnitChoice

Keep = dict[str, Bool[Tensor, " U"]]
"""False for pruned units, by group name."""


class GradualUnits(ScheduledPruner):
    """Closes gates on a schedule while an optimizer trains the model.

    No unit returns, except by ``regrow``: then of the closed units those return whose gate, closed,
    has the largest gradient (mean over the samples of its absolute value), and as many others with
    the lowest scores are closed. Weights of closed units are held, so that they return as they
    were.
    """

    def __init__(
        self,
        gates: ScoredGates,
        optimizer: Optimizer,
        schedule: PruneSchedule,
        choice: UnitChoice,
        regrowth: tuple[float, int | None] = (0.0, None),
    ) -> None:
        """Check all settings and follow the optimizer; nothing is pruned yet.

        Args:
            gates: The gates that are closed.
            optimizer: The optimizer that trains the model.
            schedule: The sparsity over the steps.
            choice: How units are chosen.
            regrowth: Fraction of the pruned units that returns, and the steps between regrowths.

        Raises:
            ConfigError: A value is invalid, the count is impossible, no unit would be pruned, or
                more are pruned already.
        """
        self.gates, self.choice = gates, choice
        self._expected: int | None = None
        check_whole("round_to", choice.round_to)
        self._least = fewest_units(gates.groups, choice.least)
        equal = {group.name: torch.zeros(group.units) for group in gates.groups}
        pruned = gates.closed + len(
            select_units(
                equal,
                gates.keep,
                schedule.final,
                scope=choice.scope,
                least=self._least,
                multiples=self._multiples,
            )
        )
        check_some_pruned("sparsity", schedule.final, gates.units, gates.kind, pruned)
        with ExitStack() as stack:
            # First, so that units closed at a step are held from the next step on, and closed ones
            # have their weights when they are scored.
            self._hold = stack.enter_context(gates.hold(optimizer))
            super().__init__(gates.model, optimizer, schedule, *regrowth)
            stack.pop_all()

    @property
    def in_force(self) -> bool:
        """Whether it still follows the optimizer."""
        return bool(self._handles)

    @override
    def remove(self) -> None:
        super().remove()
        self._hold.remove()

    @property
    @override
    def achieved(self) -> float:
        """Fraction of units whose gates are closed, counted."""
        return self.gates.closed / self.gates.units

    @override
    def _is_exact(self) -> bool:
        return self.gates.closed == self._expected

    @override
    def _prune(self, sparsity: float) -> None:
        keep = self.gates.keep
        parts = [
            part
            for part in _parts(keep, by_layer=self.choice.scope == "layer")
            if unit_count(sparsity, sum(map(len, part.values()))) > _closed(part)
        ]
        scores = self._scores() if parts else {}
        for part in parts:
            lowest = select_units(
                {name: scores[name] for name in part},
                part,
                sparsity,
                least=self._least,
                multiples={name: self._multiples[name] for name in part},
            )
            for layer, unit, _ in lowest:
                keep[[*part][layer]][unit] = False
        self._set(keep)
        self._expected = self.gates.closed

    @override
    def _regrow(self) -> None:
        keep = self.gates.keep
        # Where widths are rounded, the number of each layer has to remain.
        by_layer = self.choice.scope == "layer" or max(self._multiples.values()) > 1
        parts = [
            part for part in _parts(keep, by_layer=by_layer) if int(self.regrow * _closed(part)) > 0
        ]
        if not parts:
            return
        scores = self._scores()
        with _closed_by_value(self.gates):
            gradients = self._scores("gradient")
        for part in parts:
            keep |= regrown(part, scores, gradients, self.regrow, self._least)
        self._set(keep)

    @property
    def _multiples(self) -> dict[str, int]:
        return {
            group.name: group.unit_multiple(self.choice.round_to) for group in self.gates.groups
        }

    def _scores(self, ranker: str | Ranker | None = None) -> Scores:
        choice, model = self.choice, self.gates.model
        with torch.autocast(model.device.type, enabled=False):
            scores = self.gates.score(ranker or choice.ranker, choice.data, ranks=choice.ranks)
        return share_scores(self.gates.groups, scores) if choice.uniform else scores

    def _set(self, keep: Keep) -> None:
        for name, gate in self.gates.gates.items():
            gate.keep.copy_(keep[name])

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state: numbers, and masks and factors of the gates."""
        states = {name: GateState.of(gate) for name, gate in self.gates.gates.items()}
        mine = {
            "expected": self._expected,
            "keep": {name: state.keep for name, state in states.items()},
            "value": {name: state.value for name, state in states.items()},
        }
        return super().state_dict() | mine

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, with the gates of its step.

        Raises:
            ConfigError: It is of other settings or other units. Nothing is changed then.
        """
        gates = self.gates.gates
        check_covers("load_state_dict: keep", state.get("keep"), gates, torch.bool)
        check_covers("load_state_dict: value", state.get("value"), gates)
        super().load_state_dict(state)
        self._expected = state["expected"]
        for name, gate in gates.items():
            GateState(state["keep"][name], state["value"][name]).restore(gate)

    @override
    def _settings(self) -> dict[str, Any]:
        choice = self.choice
        ranker = {"name": choice.ranker.name, **choice.ranker.model_dump(mode="json")}
        mine = {"kind": self.gates.kind, "ranker": ranker}
        for name in ("scope", "least", "round_to", "uniform"):
            mine[name] = getattr(choice, name)
        return super()._settings() | mine


def regrown(keep: Keep, scores: Scores, gradients: Scores, share: float, least: int) -> Keep:
    """Return masks with some units opened and as many closed.

    Args:
        keep: The masks of groups whose units may take each other's place.
        scores: Score of each unit; the lowest are closed.
        gradients: Gradient of each unit; of the closed ones the largest are opened.
        share: Fraction of the closed units that is opened, rounded down.
        least: Units that every group keeps.
    """
    names, opened = [*keep], {name: mask.clone() for name, mask in keep.items()}
    closed = [
        (float(gradients[name][unit]), name, unit)
        for name, mask in keep.items()
        for unit in (~mask).nonzero().flatten().tolist()
    ]
    size = sum(map(len, keep.values()))
    count = min(int(share * len(closed)), size - len(closed))
    if not count:
        return opened
    returning = sorted(closed, key=lambda unit: -unit[0])[:count]
    # Above all others, so that no unit that returns is closed at once.
    marked = {name: scores[name].clone() for name in names}
    for _, name, unit in returning:
        opened[name][unit], marked[name][unit] = True, torch.inf
    for layer, unit, _ in select_units(marked, opened, len(closed) / size, least=least):
        opened[names[layer]][unit] = False
    return opened


@contextmanager
def _closed_by_value(gates: ScoredGates) -> Iterator[None]:
    """Close gates by a factor of 0, so they have gradients."""
    before = [(gate, gate.keep, gate.value) for gate in gates.gates.values()]
    try:
        for gate, keep, value in before:
            gate.value, gate.keep = (value * keep).detach(), torch.ones_like(keep)
        yield
    finally:
        for gate, keep, value in before:
            gate.keep, gate.value = keep, value


def _parts(keep: Keep, *, by_layer: bool) -> list[Keep]:
    """Return the masks of units that are compared with each other."""
    return [{name: mask} for name, mask in keep.items()] if by_layer else [keep]


def _closed(keep: Mapping[str, Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in keep.values())
