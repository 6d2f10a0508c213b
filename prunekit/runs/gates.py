"""Gates: whether a pruned model keeps the limits that the config sets."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from prunekit.config.gates_table import Gates
from prunekit.formatting import FRACTIONS, measured, number

NAMES = {
    "perplexity_increase": "rise of perplexity",
    "accuracy_drop": "loss of accuracy",
    "sparsity_gap": "distance from the sparsity asked for",
    "layer_error": "relative error of a layer",
}
"""The limits in words."""


def check_gates(gates: Gates | None, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each limit with what was reached, the worst of its kind.

    Args:
        gates: The limits; None: there are none.
        report: The report of the run.

    Returns:
        ``name``, ``asked`` (the limit), ``achieved``, ``met``, and ``where`` it was measured.
    """
    if gates is None:
        return []
    return [_result(name, limit, report) for name, limit in gates.limits.items()]


def failures(report: Mapping[str, Any]) -> str:
    """Return the limits that are not met, in words."""
    missed = [each for each in report.get("gates") or [] if not each["met"]]
    return "\n".join(
        f"gates.{each['name']}: {number(each['achieved'])} in {each['where']}, at most "
        f"{number(each['asked'])} are allowed."
        for each in missed
    )


def _result(name: str, limit: float, report: Mapping[str, Any]) -> dict[str, Any]:
    found = [*MEASURES[name](report)]
    # NaN counts as worse than anything.
    achieved, where = max(
        found, key=lambda each: (math.isnan(each[0]), each[0]), default=(math.nan, "nothing")
    )
    return {
        "name": name,
        "asked": limit,
        "achieved": achieved,
        "met": achieved <= limit,
        "where": where,
    }


def _perplexity(report: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
    for each in report["evaluation"]:
        if each["metric"] == "perplexity":
            before, after = float(each["before"]), float(each["after"])
            words = f"{measured('perplexity', before)} → {measured('perplexity', after)}"
            yield after / before - 1, f"{each['data']} ({words})"


def _accuracy(report: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
    for each in report["evaluation"]:
        metric = each["metric"]
        if metric in FRACTIONS:
            before, after = float(each["before"]), float(each["after"])
            words = f"{measured(metric, before)} → {measured(metric, after)}"
            yield before - after, f"{metric} of {each['data']} ({words})"


def _sparsity(report: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
    """Yield the distance from what was asked for; of units, by kind."""
    sparsity = report["sparsity"]
    if budget := sparsity.get("budget"):
        before, after = sparsity["parameters"]
        yield abs(after / before - budget), f"{after:,} of {before:,} parameters"
    elif "removed" in sparsity:
        for kind, (gone, whole) in sparsity["removed"].items():
            yield abs(gone / whole - sparsity["target"]), f"{gone} of {whole} {kind}"
    else:
        zeros, whole = sparsity["zeros"], sparsity["of"]
        words = f"{zeros:,} zeros of {whole:,} weights, {sparsity['target']:g} asked for"
        yield abs(sparsity["achieved"] - sparsity["target"]), words


def _errors(report: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
    for layer in report["layers"]:
        if layer.get("relative_error") is not None:
            yield float(layer["relative_error"]), layer["name"]


MEASURES = {
    "perplexity_increase": _perplexity,
    "accuracy_drop": _accuracy,
    "sparsity_gap": _sparsity,
    "layer_error": _errors,
}
