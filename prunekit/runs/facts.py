"""The keys of ``report.json`` that runs of every kind share."""

from collections.abc import Mapping
from typing import Any

from prunekit.reports import environment
from prunekit.runs.plan_base import PlanBase
from prunekit.runs.texts import Data

REPORT_KEYS = (
    "prunekit", "kind", "config", "config_text", "model", "calibration", "sparsity", "gates",
    "storage",
    "layers", "stock", "views", "training", "agreement", "evaluation", "seconds", "memory", "seed",
    "environment", "notes", "files", "proof", "ranks",
)  # fmt: skip
"""Keys of the reports of all kinds of runs, in the order in which they are written."""


def report_frame(
    plan: PlanBase,
    tokens: Data | None,
    evaluations: list[dict[str, Any]],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Return the keys that reports of all kinds of runs share.

    Args:
        plan: The plan of the run.
        tokens: Calibration data; None for a run without it.
        evaluations: Journal entries of the evaluations, before and after pruning.
        seconds: Time of each phase and the total.
    """
    from prunekit._version import __version__

    return {
        "prunekit": __version__,
        "config": plan.config.dump(),
        "config_text": plan.config.text,
        "model": model_facts(plan),
        "calibration": calibration_facts(plan, tokens),
        "evaluation": paired(evaluations),
        "seconds": dict(seconds),
        "memory": environment.peak_memory(plan.device),
        "seed": plan.config.calibration.seed if plan.config.calibration else None,
        "environment": environment.environment(plan.device),
        "notes": list(plan.notes),
    }


def in_report_order(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report with its keys in the order of ``REPORT_KEYS``.

    Raises:
        KeyError: ``REPORT_KEYS`` lacks a key of the report.
    """
    if unknown := report.keys() - set(REPORT_KEYS):
        raise KeyError(f"not in REPORT_KEYS: {', '.join(sorted(unknown))}")
    return {key: report[key] for key in REPORT_KEYS if key in report}


def model_facts(plan: PlanBase) -> dict[str, Any]:
    """Return name, type and size of the model."""
    return {
        "path": plan.config.model.path,
        "architecture": type(plan.model).__name__,
        "model_type": plan.model.config.model_type,
        "parameters": plan.parameters,
        "prunable_parameters": plan.prunable,
        "blocks": plan.block_count,
    }


def calibration_facts(plan: PlanBase, tokens: Data | None) -> dict[str, Any] | None:
    """Return source, size and digest of the calibration data; None without it."""
    if tokens is None or plan.config.calibration is None:
        return None
    return {
        "description": tokens.description,
        "samples": len(tokens),
        "length": tokens.longest,
        "tokens": tokens.tokens,
        "seed": plan.config.calibration.seed,
        "sha256": tokens.digest,
    }


def paired(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the measures of the same text before and after pruning."""
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in evaluations:
        names = {"data": entry["data"], "metric": entry["metric"]}
        pair = pairs.setdefault((entry["source"], entry["metric"]), names)
        pair[entry["which"]] = entry["value"]
        pair["protocol"] = entry["protocol"]
        for key in ("correct", "stderr"):
            if entry.get(key) is not None:
                pair["samples"] = entry["samples"]
                pair.setdefault(key, {})[entry["which"]] = entry[key]
        pair |= {key: entry[key] for key in ("harness", "higher_is_better") if key in entry}
    return list(pairs.values())
