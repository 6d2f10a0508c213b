"""TODO-DOC prunekit/runs/facts.py (out of prunekit/result.py)."""

from typing import Any

from prunekit.data.tokens import Tokens
from prunekit.runs.sparsify.plan import Plan
from prunekit.runs.structured.plan import StructuredPlan


def calibration_facts(plan: Plan | StructuredPlan, tokens: Tokens | None) -> dict[str, Any] | None:
    """Return what the statistics were gathered from."""
    if tokens is None or plan.config.calibration is None:
        return None
    samples, length = tokens.ids.shape
    return {
        "description": tokens.description,
        "samples": samples,
        "length": length,
        "tokens": samples * length,
        "seed": plan.config.calibration.seed,
        "sha256": tokens.digest,
    }


def paired(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join what was measured before and after on the same text."""
    pairs: dict[str, dict[str, Any]] = {}
    for entry in evaluations:
        pair = pairs.setdefault(entry["source"], {"data": entry["data"], "metric": entry["metric"]})
        pair[entry["which"]] = entry["value"]
        pair["protocol"] = entry["protocol"]
    return list(pairs.values())
