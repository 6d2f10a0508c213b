"""A sweep: each run by itself, what comes out measured, and at the end all of it on one page.

Runs that are done are found in the journal, so that a sweep which was stopped, or has become
larger, goes on with what is missing.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from prunekit.checkpoint.output import Output
from prunekit.config.run_config import Config, StructuredConfig
from prunekit.config.sweep_table import level
from prunekit.errors import PrunekitError
from prunekit.reports import environment
from prunekit.reports import report as reports
from prunekit.runs.record import Record, stoppable
from prunekit.runs.sweep.measure import measure
from prunekit.runs.sweep.plan import SweepPlan
from prunekit.runs.worker import run_in_subprocess
from prunekit.structured.agreement import spearman
from prunekit.structured.rankers import Scores

RunOne = Callable[[Config | StructuredConfig, bool], Iterator[Record]]
"""Plans a run, carries it out or on with it, and yields what is measured."""


def run(
    plan: SweepPlan,
    run_one: RunOne,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """Carry out a sweep and yield what is measured; ``stop`` is asked after each record.

    Raises:
        StoppedError: So it was asked.
        PrunekitError: Of the run that it names; the folder then stays resumable.
    """
    output = Output(plan.folder, shards=0)
    try:
        output.begin("sweep", resume=resume, overwrite=overwrite)
        yield from stoppable(_records(plan, run_one, output, resume=resume), stop)
    finally:
        output.close()


def _records(plan: SweepPlan, run_one: RunOne, output: Output, *, resume: bool) -> Iterator[Record]:
    began = time.perf_counter()
    first = plan.first.config
    yield Record("phase", f"dense model, beside {len(plan.runs)} runs", {"steps": 1})
    source = str(plan.first.checkpoint.folder)
    dense = yield from _measured(plan, output, "dense", source, first)
    runs = []
    for number, (name, made) in enumerate(plan.runs.items(), 1):
        config = made.config.model_copy(update={"evaluate": None})
        if ("measured", name) not in output.done or not _same(plan, output, name):
            yield Record("phase", f"{name} ({number} of {len(plan.runs)})", {"steps": 1})
            try:
                for record in run_in_subprocess(run_one, config, resume):
                    if record.kind != "finish":
                        yield record
            except PrunekitError as error:
                raise type(error)(f"{name}: {error}") from error
        facts = yield from _measured(plan, output, name, config.output.path, made.config)
        runs.append(_entry(plan, name, facts, dense))
        if not plan.config.sweep.keep:
            for file in Path(config.output.path).glob("*.safetensors*"):
                file.unlink()
    seconds = {"total": time.perf_counter() - began}
    report = _report(plan, dense, runs) | {"seconds": seconds}
    reports.write(report, plan.folder)
    yield Record("finish", str(plan.folder), report)


def _measured(
    plan: SweepPlan, output: Output, name: str, folder: str, config: Config | StructuredConfig
) -> Iterator[Record]:
    """Return the facts of a model, from the journal or measured now."""
    if ("measured", name) in output.done and _same(plan, output, name):
        facts = output.done["measured", name]["facts"]
    else:
        (facts,) = run_in_subprocess(measure, folder, config, plan.config.sweep.tokens)
        output.note("measured", name, {"of": _judged(plan, name), "facts": facts})
    for found in facts["evaluation"]:
        yield Record("evaluation", name, {**found, "which": name})
    return facts


def _same(plan: SweepPlan, output: Output, name: str) -> bool:
    """Say whether what the journal has of a run was measured of the same."""
    return output.done["measured", name]["of"] == _judged(plan, name)


def _judged(plan: SweepPlan, name: str) -> dict[str, Any]:
    """Return all that what is measured depends on."""
    dense = {key: plan.first.config.dump()[key] for key in ("model", "evaluate")}
    config = dense if name == "dense" else plan.runs[name].config.dump()
    return {"config": config, "tokens": plan.config.sweep.tokens}


def _entry(
    plan: SweepPlan, name: str, facts: dict[str, Any], dense: dict[str, Any]
) -> dict[str, Any]:
    """Return a run as the comparison has it; its own report is told how it was judged."""
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
        "sparsity": level(plan.runs[name].config.prune),
        "achieved": sparsity["achieved"],
        "parameters": sparsity.get("parameters", [0, own["model"]["parameters"]])[1],
        "active": {kind: whole - gone for kind, (gone, whole) in removed.items()},
        "whole": {kind: whole for kind, (_, whole) in removed.items()},
        "seconds": own["seconds"]["total"],
        **facts,
    }


def _agreement(plan: SweepPlan) -> list[dict[str, Any]]:
    """Return, for each kind of units, Spearman's ρ between what rankers made of the dense model."""
    seen: dict[str, dict[str, Scores]] = {}
    for made in plan.runs.values():
        config = made.config
        if isinstance(config, StructuredConfig):
            method = config.prune.method
            others = method.model_dump(exclude_defaults=True)
            name = ", ".join([method.name, *(f"{key} {value}" for key, value in others.items())])
            for layer in reports.load(Path(config.output.path))["layers"]:
                scores = seen.setdefault(layer["kind"], {}).setdefault(name, {})
                scores.setdefault(layer["name"], torch.tensor(layer["scores"]))
    return [
        {
            "kind": kind,
            "rankers": [*by_ranker],
            "spearman": [[spearman(a, b) for b in by_ranker.values()] for a in by_ranker.values()],
        }
        for kind, by_ranker in seen.items()
        if len(by_ranker) > 1 and len({frozenset(scores) for scores in by_ranker.values()}) == 1
    ]


def _report(plan: SweepPlan, dense: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
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
        "agreement": _agreement(plan),
        "environment": environment.environment(first.device),
    }
