"""TODO-DOC prunekit/runs/structured/result.py (out of prunekit/shrink_running.py)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from prunekit.structured.rankers import Scores
from prunekit.structured.unit_gates import Gates

VIEWED_HEADS, VIEWED_TOKENS = 2, 20
"""Heads from either end of the ranking, and tokens, that the report shows one by one."""


def _described(
    gates: Gates, scores: Scores, entropies: Mapping[str, list[float] | None], truth: Scores
) -> dict[str, dict[str, Any]]:
    """Return what the report says of each place, by its name."""
    kept = gates.kept
    return {
        place.name: {
            "name": place.name,
            "kind": gates.kind,
            "units": place.units,
            "kept": kept[place.name],
            "sparsity": 1 - len(kept[place.name]) / place.units,
            "parameters": place.parameters,
            "scores": scores[place.name].tolist(),
            "entropy": entropies.get(place.name),
            **({"truth": truth[place.name].tolist()} if truth else {}),
        }
        for place in gates.places
    }


def _rounded(value: Tensor) -> Any:  # noqa: ANN401  nested lists
    """Return a tensor as lists of numbers with as many digits as a picture shows."""
    return (value.double() * 10**4).round().div(10**4).tolist()
