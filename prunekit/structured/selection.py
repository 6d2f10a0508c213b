"""Which units go: exact counts, and no layer without any."""

from collections import Counter
from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from prunekit.errors import ConfigError

Scope = Literal["global", "layer"]


class Removed(NamedTuple):
    """A unit that goes: the place of its layer among the sites, its own there, and its score."""

    layer: int
    unit: int
    score: float


def choose(
    scores: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    sparsity: float,
    *,
    scope: Scope = "global",
    least: int = 1,
    multiples: Mapping[str, int] | None = None,
) -> list[Removed]:
    """Return the units with the lowest scores that go, lowest first.

    Args:
        scores: A score of each unit, by site; higher stays, of equal ones the lower index.
        keep: False for those that are gone; they count as such and are not returned.
        sparsity: The part of all units that is gone afterwards, from 0 up to 1. The count is
            rounded to the nearest integer, half up.
        scope: "global" compares units of all layers, "layer" takes the same part of each.
        least: Units that every layer keeps, 1 or more.
        multiples: The units that stay of a layer are rounded up to a multiple of this, or all stay.

    Raises:
        ConfigError: This cannot be had, or a score is not a number.
    """
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity: {sparsity} is not from 0 up to, but without, 1.")
    if least < 1:
        raise ConfigError(f"least: {least} would leave layers without any; it is at least 1.")
    refuse_no_numbers(scores)
    groups = [[name] for name in keep] if scope == "layer" else [[*keep]]
    layers = {name: layer for layer, name in enumerate(keep)}
    removed: list[Removed] = []
    for names in groups:
        gone = sum(int((~keep[name]).sum()) for name in names)
        count = int(sparsity * sum(len(keep[name]) for name in names) + 0.5) - gone
        removed += _lowest(
            [
                Removed(layers[name], unit, float(scores[name][unit]))
                for name in names
                for unit in keep[name].nonzero().flatten().tolist()
            ],
            count,
            {layers[name]: int(keep[name].sum()) - least for name in names},
        )
    left = {layers[name]: int(units.sum()) for name, units in keep.items()}
    return _restore(removed, left, {layers[name]: each for name, each in (multiples or {}).items()})


def refuse_no_numbers(scores: Mapping[str, Tensor]) -> None:
    """Refuse scores that cannot be compared.

    Raises:
        ConfigError: Names the first that is not a number.
    """
    for name, score in scores.items():
        if score.isnan().any():
            unit = int(score.isnan().nonzero()[0])
            raise ConfigError(f"{name}: the score of unit {unit} is not a number.")


def _restore(
    removed: list[Removed], left: Mapping[int, int], multiples: Mapping[int, int]
) -> list[Removed]:
    """Return what goes if the units that stay of each layer are rounded up to a multiple.

    Of a layer those that go last are kept.
    """
    gone = Counter(unit.layer for unit in removed)
    spared = {
        layer: min(count, -(left[layer] - count) % multiples.get(layer, 1))
        for layer, count in gone.items()
    }
    found = []
    for unit in reversed(removed):
        if spared[unit.layer] > 0:
            spared[unit.layer] -= 1
        else:
            found.append(unit)
    return found[::-1]


def _lowest(candidates: list[Removed], count: int, spare: dict[int, int]) -> list[Removed]:
    """Return ``count`` of the candidates, no more of a layer than it can spare."""
    if count < 0:
        raise ConfigError(
            f"sparsity: {-count} units more than that are pruned already. Reactivate some, or ask "
            "for more."
        )
    if count > (most := sum(max(left, 0) for left in spare.values())):
        raise ConfigError(
            f"sparsity: {count} units should go, but with those that each layer keeps only {most} "
            "can. Ask for less, or lower `least`."
        )
    chosen: list[Removed] = []
    for unit in sorted(candidates, key=lambda unit: (unit.score, -unit.layer, -unit.unit)):
        if len(chosen) == count:
            break
        if spare[unit.layer] > 0:
            spare[unit.layer] -= 1
            chosen.append(unit)
    assert len(chosen) == count
    return chosen
