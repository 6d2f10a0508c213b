"""Which units go so that a model has at most so many parameters, units of several kinds at once.

Units are ordered by density, their score by the parameters that go with them, and of this order the
largest part from the front is kept that meets the budget. What that part takes is counted jointly:
without a hidden dimension every head is smaller, and without a block its heads are nothing.
Source: Zhao et al., APT, arXiv:2401.12200, §4.2, with the maximum that it calls the minimum.

Shapes: U units of a place.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, prod

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit.errors import ConfigError
from prunekit.formatting import percent
from prunekit.models.units.base import UnitGroup
from prunekit.structured.selection import Scope, refuse_no_numbers

Keep = Mapping[str, Bool[Tensor, " U"]]
"""Which units of each place stay."""


class Count:
    """Counts the parameters that a model has left, exactly, from the shapes of its parameters."""

    def __init__(self, places: Sequence[UnitGroup], whole: int) -> None:
        """``whole``: the parameters of the model, those that belong to no unit included."""
        self.whole = whole
        self._places = places
        self._shapes: dict[int, list[int]] = {}
        self._shares: dict[int, dict[int, list[tuple[str, Tensor]]]] = {}
        for place in places:
            for parameter, axis, owner in place.shares:
                self._shapes[id(parameter)] = [*parameter.shape]
                axes = self._shares.setdefault(id(parameter), {})
                axes.setdefault(axis, []).append((place.name, owner))

    def left(self, keep: Keep) -> int:
        """Return the parameters of the model if only these units stay."""
        total = self.whole
        for parameter in self._shares:
            left = [int(rows.sum()) for rows in self._rows(parameter, keep)]
            total += prod(left) - prod(self._shapes[parameter])
        return total

    def costs(self, keep: Keep) -> dict[str, Float[Tensor, " U"]]:
        """Return the parameters that go with each unit, by place, if one more goes than did."""
        costs = {
            place.name: torch.zeros(place.units, dtype=torch.float64) for place in self._places
        }
        for parameter, axes in self._shares.items():
            rows = self._rows(parameter, keep)
            left = [int(each.sum()) for each in rows]
            for axis, shares in axes.items():
                others = prod(left[:axis] + left[axis + 1 :])
                for name, owner in shares:
                    units = len(costs[name])
                    costs[name] += others * torch.bincount(owner[rows[axis]], minlength=units)
        return costs

    def _rows(self, parameter: int, keep: Keep) -> list[Bool[Tensor, " R"]]:
        """Return which rows of a parameter are left, along each of its axes."""
        axes = self._shares[parameter]
        return [
            torch.stack([keep[name][owner] for name, owner in axes[axis]]).all(0)
            if axis in axes
            else torch.ones(size, dtype=torch.bool)
            for axis, size in enumerate(self._shapes[parameter])
        ]


@dataclass(frozen=True)
class Terms:
    """What is asked for.

    Attributes:
        parameters: How many the model may have afterwards.
        scope: "global" orders units one by one, "layer" those of the same rank in all layers of a
            kind together, so that each layer keeps the same part.
        least: Units that every place keeps.
        multiples: The units that stay of a place are rounded up to a multiple of this, or all stay.
        allowed: Says of numbers of units, by place, whether they may be; all may if not given.
    """

    parameters: int
    scope: Scope = "global"
    least: int = 1
    multiples: Mapping[str, int] = field(default_factory=dict)
    allowed: Callable[[Mapping[str, int]], bool] = lambda _: True


class Order:
    """The units that are left, the densest first, in groups that stay or go together.

    ``fixed``: how many of the groups stay whatever is asked for.
    """

    def __init__(
        self,
        places: Sequence[UnitGroup],
        scores: Mapping[str, Float[Tensor, " U"]],
        keep: Keep,
        costs: Mapping[str, Float[Tensor, " U"]],
        terms: Terms,
    ) -> None:
        self.keep, self.terms = keep, terms
        self._ranked: dict[str, list[int]] = {}
        groups: dict[tuple[str, int], list[tuple[str, int, float, float]]] = {}
        longest = {
            kind: max(place.units for place in places if place.kind == kind)
            for kind in {place.kind for place in places}
        }
        for place in places:
            score, cost = scores[place.name].tolist(), costs[place.name].tolist()
            left = keep[place.name].nonzero().flatten().tolist()
            density = [_density(*each) for each in zip(score, cost, strict=True)]
            # Stable, so that of equal ones the lower index stays.
            self._ranked[place.name] = sorted(left, key=density.__getitem__, reverse=True)
            for rank, unit in enumerate(self._ranked[place.name]):
                level = rank * longest[place.kind] // place.units
                key = (place.kind, level) if terms.scope == "layer" else (place.name, rank)
                groups.setdefault(key, []).append((place.name, rank, score[unit], cost[unit]))
        self._groups = sorted(groups.values(), key=self._density, reverse=True)
        self.fixed = sum(self._density(group) == inf for group in self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def first(self, count: int) -> dict[str, Bool[Tensor, " U"]]:
        """Return what stays of each place if ``count`` groups do, numbers rounded up."""
        numbers = dict.fromkeys(self._ranked, 0)
        for group in self._groups[:count]:
            for name, *_ in group:
                numbers[name] += 1
        stays = {}
        for name, number in numbers.items():
            multiple = self.terms.multiples.get(name, 1)
            stays[name] = torch.zeros_like(self.keep[name])
            stays[name][self._ranked[name][: -(-number // multiple) * multiple]] = True
        return stays

    def _density(self, group: list[tuple[str, int, float, float]]) -> float:
        """Return score by parameters; infinite for what has to stay."""
        if any(rank < self.terms.least for _, rank, *_ in group):
            return inf
        return _density(sum(score for *_, score, _ in group), sum(cost for *_, cost in group))


def _density(score: float, cost: float) -> float:
    """Return score by parameters; the lowest for what takes none, as it is in a block that went."""
    return score / cost if cost else -inf


def choose_within(
    places: Sequence[UnitGroup],
    scores: Mapping[str, Float[Tensor, " U"]],
    keep: Keep,
    whole: int,
    terms: Terms,
) -> dict[str, Bool[Tensor, " U"]]:
    """Return which units of each place stay: as many of the densest as the budget allows.

    Args:
        places: Of one kind or several.
        scores: A score of each unit, by place; those of several kinds have to be comparable.
        keep: False for units that are gone already.
        whole: Parameters of the model with all units.
        terms: What is asked for.

    Raises:
        ConfigError: The budget cannot be met, or a score is not a number.
    """
    refuse_no_numbers(scores)
    count = Count(places, whole)
    order = Order(places, scores, keep, count.costs(keep), terms)
    # Fewer units are never more parameters, so that the largest part is found by bisection.
    most = bisect_right(
        range(len(order) + 1), terms.parameters, key=lambda number: count.left(order.first(number))
    )
    for number in reversed(range(order.fixed, most)):
        stays = order.first(number)
        if terms.allowed({name: int(units.sum()) for name, units in stays.items()}):
            return stays
    fewest = count.left(order.first(order.fixed))
    raise ConfigError(
        f"parameters: {percent(terms.parameters / whole)} cannot be had: with the units that each "
        f"layer keeps {percent(fewest / whole)} of the model stay. Allow more, lower `least`, or "
        "let other units go too."
    )
