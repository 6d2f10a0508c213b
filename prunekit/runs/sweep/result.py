"""The report of a sweep: all runs beside the dense model."""

from pathlib import Path
from typing import Any

import torch

from prunekit.config.run_config import StructuredConfig
from prunekit.config.sweep_table import removed_fraction
from prunekit.reports import environment
from prunekit.reports import report as reports
from prunekit.runs.sweep.plan import SweepPlan
from prunekit.structured.agreement import spearman
from prunekit.structured.rankers import Scores


def sweep_report(
    plan: SweepPlan, dense: dict[str, Any], runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the report of a sweep, without its time.

    Args:
        plan: The plan of the sweep.
        dense: Facts of the dense model; see :func:`prunekit.runs.sweep.measure.measure`.
        runs: The entries of the runs, from :func:`run_entry`.
    """
    from prunekit._version import __version__

    first = plan.first
    return {
        "prunekit": __version__,
        "kind": reports.SWEEP,
        "config": first.config.dump() | {"sweep": plan.config.sweep.model_dump()},
        "config_text": plan.config.text,
        "model": {
            "path": first.config.model.path,
            "architecture": type(first.model).__name__,
            "parameters": first.parameters,
        },
        "dense": dense,
        "runs": runs,
        "agreement": ranker_agreement(plan),
        "environment": environment.environment(first.device),
    }


def run_entry(
    plan: SweepPlan, name: str, facts: dict[str, Any], dense: dict[str, Any]
) -> dict[str, Any]:
    """Return the entry of a run; update its own report.

    The run's report gets the perplexities, which the sweep has measured.

    Args:
        plan: The plan of the sweep.
        name: Name of the run.
        facts: Facts of the pruned model.
        dense: Facts of the dense model.
    """
    folder = Path(plan.runs[name].config.output.path)
    own = reports.load(folder)
    own["evaluation"] = [
        {
            "data": after["data"],
            "metric": after["metric"],
            "before": before["value"],
            "after": after["value"],
            "protocol": after["protocol"],
        }
        for before, after in zip(dense["evaluation"], facts["evaluation"], strict=True)
    ]
    reports.write(own, folder)
    sparsity = own["sparsity"]
    removed = sparsity.get("removed", {})
    return {
        "name": name,
        "series": plan.series(name),
        "prune": own["config"]["prune"],
        "calibration": own["config"].get("calibration"),
        "sparsity": removed_fraction(plan.runs[name].config.prune),
        "achieved": sparsity["achieved"],
        "parameters": sparsity.get("parameters", [0, own["model"]["parameters"]])[1],
        "active": {kind: whole - gone for kind, (gone, whole) in removed.items()},
        "whole": {kind: whole for kind, (_, whole) in removed.items()},
        "seconds": own["seconds"]["total"],
        **facts,
    }


def ranker_agreement(plan: SweepPlan) -> list[dict[str, Any]]:
    """Return Spearman's ρ between the rankers, for each kind of units.

    Scores are those of the dense model. A kind is left out unless several rankers scored the same
    units of it.
    """
    by_kind: dict[str, dict[str, Scores]] = {}
    for one in plan.runs.values():
        config = one.config
        if isinstance(config, StructuredConfig):
            method = config.prune.method
            settings = method.model_dump(exclude_defaults=True)
            name = ", ".join([method.name, *(f"{key} {value}" for key, value in settings.items())])
            for layer in reports.load(Path(config.output.path))["layers"]:
                scores = by_kind.setdefault(layer["kind"], {}).setdefault(name, {})
                scores.setdefault(layer["name"], torch.tensor(layer["scores"]))
    return [
        {
            "kind": kind,
            "rankers": [*by_ranker],
            "spearman": [[spearman(a, b) for b in by_ranker.values()] for a in by_ranker.values()],
        }
        for kind, by_ranker in by_kind.items()
        if len(by_ranker) > 1 and len({frozenset(scores) for scores in by_ranker.values()}) == 1
    ]
