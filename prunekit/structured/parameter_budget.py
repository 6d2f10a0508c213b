"""Selection of units of several kinds within a parameter budget.

Units are sorted by density, their score per parameter removed with them, and the longest prefix of
this order that fits the budget is kept. The parameters are counted jointly: without a coordinate of
the residual stream every head is smaller, and without a block its heads have no parameters.
Source: Zhao et al., APT, arXiv:2401.12200, §4.2, with the maximum that it calls the minimum.

Shapes: U units of a group, R rows of a parameter along an axis.
"""

from bisect import bisect_right
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from math import inf, prod

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.architectures import find_architecture
from prunekit.architectures.adapters import without_adapters
from prunekit.errors import ConfigError
from prunekit.formatting import percent
from prunekit.models.units.base import UnitGroup
from prunekit.models.units.kinds import Counted
from prunekit.structured.selection import UnitScope, refuse_nan_scores

Keep = Mapping[str, Bool[Tensor, " U"]]
"""Which units of each group are kept, by group name."""


def counted_parameters(model: PreTrainedModel, of: Counted) -> set[nn.Parameter]:
    """Return the parameters that a budget counts; adapters are left out.

    Args:
        model: The model, with or without weights.
        of: "model" for all, "blocks" for those of the blocks.
    """
    parts: list[nn.Module] = [model]
    if of == "blocks":
        stacks = find_architecture(model).stacks
        parts = [model.base_model.get_submodule(stack.blocks) for stack in stacks]
    with without_adapters(model):
        return {each for part in parts for each in part.parameters()}


class ParameterCounter:
    """Counts the parameters that a pruned model has, exactly, from the shapes."""

    def __init__(
        self,
        groups: Sequence[UnitGroup],
        whole: int,
        counted: Container[nn.Parameter] | None = None,
    ) -> None:
        """Find the parameters of the units.

        Args:
            groups: Groups of all kinds that are removed.
            whole: Number of the parameters that are counted, with all units.
            counted: The parameters that are counted; None for all.
        """
        self.whole = whole
        self._groups = groups
        self._shapes: dict[int, list[int]] = {}
        self._owners: dict[int, dict[int, list[tuple[str, Tensor]]]] = {}
        for group in groups:
            for parameter, axis, owner in group.parameter_axes:
                if counted is not None and parameter not in counted:
                    continue
                self._shapes[id(parameter)] = [*parameter.shape]
                axes = self._owners.setdefault(id(parameter), {})
                axes.setdefault(axis, []).append((group.name, owner))

    def remaining(self, keep: Keep) -> int:
        """Return the parameters of the model with only the kept units."""
        total = self.whole
        for parameter in self._owners:
            left = [int(rows.sum()) for rows in self._rows(parameter, keep)]
            total += prod(left) - prod(self._shapes[parameter])
        return total

    def costs(self, keep: Keep) -> dict[str, Float[Tensor, " U"]]:
        """Return the parameters saved by removing one more unit, by group."""
        costs = {
            group.name: torch.zeros(group.units, dtype=torch.float64) for group in self._groups
        }
        for parameter, axes in self._owners.items():
            rows = self._rows(parameter, keep)
            left = [int(each.sum()) for each in rows]
            for axis, owners in axes.items():
                per_row = prod(left[:axis] + left[axis + 1 :])
                for name, owner in owners:
                    units = len(costs[name])
                    costs[name] += per_row * torch.bincount(owner[rows[axis]], minlength=units)
        return costs

    def _rows(self, parameter: int, keep: Keep) -> list[Bool[Tensor, " R"]]:
        """Return the kept rows of a parameter along each axis."""
        axes = self._owners[parameter]
        return [
            torch.stack([keep[name][owner] for name, owner in axes[axis]]).all(0)
            if axis in axes
            else torch.ones(size, dtype=torch.bool)
            for axis, size in enumerate(self._shapes[parameter])
        ]


@dataclass(frozen=True)
class BudgetConstraints:
    """The budget, and the constraints on the numbers of kept units.

    Attributes:
        parameters: Maximum number of parameters of the pruned model, of those that are counted.
        scope: "global" sorts units one by one; "layer" keeps or removes units of the same rank in
            all layers of a kind together, so that each layer keeps the same fraction.
        least: Units that every group keeps; at least one of blocks and coordinates.
        multiples: The kept number of a group is rounded up to a multiple of this, or all are kept.
        allowed: Predicate on the kept numbers by group name; by default all are allowed.
        counted: The parameters that are counted; None for all.
    """

    parameters: int
    scope: UnitScope = "global"
    least: int = 1
    multiples: Mapping[str, int] = field(default_factory=dict)
    allowed: Callable[[Mapping[str, int]], bool] = lambda _: True
    counted: Container[nn.Parameter] | None = None


class UnitOrder:
    """The remaining units, densest first, in sets removed together.

    Attributes:
        keep: False for units that are removed already.
        constraints: The constraints.
        fixed: Number of leading sets that are always kept.
    """

    def __init__(
        self,
        groups: Sequence[UnitGroup],
        scores: Mapping[str, Float[Tensor, " U"]],
        keep: Keep,
        costs: Mapping[str, Float[Tensor, " U"]],
        constraints: BudgetConstraints,
    ) -> None:
        self.keep, self.constraints = keep, constraints
        self._fewest = {group.name: group.fewest(constraints.least) for group in groups}
        self._ranked: dict[str, list[int]] = {}
        sets: dict[tuple[str, int], list[tuple[str, int, float, float]]] = {}
        largest = {
            kind: max(group.units for group in groups if group.kind == kind)
            for kind in {group.kind for group in groups}
        }
        for group in groups:
            score, cost = scores[group.name].tolist(), costs[group.name].tolist()
            left = keep[group.name].nonzero().flatten().tolist()
            density = [_density(*each) for each in zip(score, cost, strict=True)]
            compared = group.comparable(
                torch.tensor(density, dtype=torch.float64), keep[group.name]
            ).tolist()
            # Stable, so that of equal ones the lower index is kept.
            self._ranked[group.name] = sorted(left, key=compared.__getitem__, reverse=True)
            for rank, unit in enumerate(self._ranked[group.name]):
                level = rank * largest[group.kind] // group.units
                by_layer = constraints.scope == "layer"
                key = (group.kind, level) if by_layer else (group.name, rank)
                sets.setdefault(key, []).append((group.name, rank, score[unit], cost[unit]))
        order = sorted(sets.values(), key=self._set_density, reverse=True)
        kinds = {group.name: group.kind for group in groups}
        # Even if no layer has to keep a unit, one of each kind is kept.
        densest = {kinds[units[0][0]]: units for units in reversed(order)}
        always = [
            self._set_density(units) == inf or units is densest[kinds[units[0][0]]]
            for units in order
        ]
        self.fixed = sum(always)
        self._sets = [*compress(order, always), *compress(order, [not each for each in always])]

    def __len__(self) -> int:
        return len(self._sets)

    def keep_first(self, count: int) -> dict[str, Bool[Tensor, " U"]]:
        """Return the kept units of the first ``count`` sets, rounded up."""
        numbers = dict.fromkeys(self._ranked, 0)
        for units in self._sets[:count]:
            for name, *_ in units:
                numbers[name] += 1
        kept = {}
        for name, number in numbers.items():
            multiple = self.constraints.multiples.get(name, 1)
            kept[name] = torch.zeros_like(self.keep[name])
            kept[name][self._ranked[name][: -(-number // multiple) * multiple]] = True
        return kept

    def _set_density(self, units: list[tuple[str, int, float, float]]) -> float:
        """Return the density of a set; infinite if always kept."""
        if any(rank < self._fewest[name] for name, rank, *_ in units):
            return inf
        return _density(sum(score for *_, score, _ in units), sum(cost for *_, cost in units))


def _density(score: float, cost: float) -> float:
    """Return score per parameter; lowest without parameters, as in a removed block."""
    return score / cost if cost else -inf


def select_within_budget(
    groups: Sequence[UnitGroup],
    scores: Mapping[str, Float[Tensor, " U"]],
    keep: Keep,
    whole: int,
    constraints: BudgetConstraints,
) -> dict[str, Bool[Tensor, " U"]]:
    """Return the densest units that fit the budget, by group.

    Args:
        groups: Groups of one kind or several.
        scores: Score of each unit, by group; those of several kinds have to be comparable.
        keep: False for units that are removed already.
        whole: Parameters of the model with all units, of those that are counted.
        constraints: The budget and its constraints.

    Raises:
        ConfigError: The budget cannot be met, or a score is not a number.
    """
    refuse_nan_scores(scores)
    counter = ParameterCounter(groups, whole, constraints.counted)
    order = UnitOrder(groups, scores, keep, counter.costs(keep), constraints)
    # Fewer units never have more parameters, so bisection finds the longest prefix.
    most = bisect_right(
        range(len(order) + 1),
        constraints.parameters,
        key=lambda number: counter.remaining(order.keep_first(number)),
    )
    for number in reversed(range(order.fixed, most)):
        kept = order.keep_first(number)
        if constraints.allowed({name: int(units.sum()) for name, units in kept.items()}):
            return kept
    fewest = counter.remaining(order.keep_first(order.fixed))
    raise ConfigError(
        f"parameters: {percent(constraints.parameters / whole)} cannot be had: with the units that "
        f"each layer keeps {percent(fewest / whole)} of the model stay. Allow more, lower `least`, "
        "or let other units go too."
    )
