"""Carries out the runs of a sweep and compares their models.

Finished runs are found in the journal, so a sweep that was stopped, or whose table has grown,
resumes with the missing runs.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prunekit.checkpoint.journal import JOURNAL, read_journal
from prunekit.checkpoint.output import OutputFolder
from prunekit.checkpoint.owned_files import RUN, owned_files
from prunekit.config.run_config import Config, StructuredConfig
from prunekit.errors import PrunekitError
from prunekit.evaluation import harness_tasks
from prunekit.reports import report as reports
from prunekit.runs.identity import digest, file_digests, model_identity
from prunekit.runs.record import Record, stoppable
from prunekit.runs.stage import Stage
from prunekit.runs.status import STATUS
from prunekit.runs.sweep.gpus import Task, run_side_by_side
from prunekit.runs.sweep.measure import measure
from prunekit.runs.sweep.plan import SweepPlan
from prunekit.runs.sweep.result import run_entry, sweep_report
from prunekit.runs.texts import tasks_of
from prunekit.runs.worker import run_in_subprocess

RunOne = Callable[[Config | StructuredConfig, bool], Iterator[Record]]
"""Plans and carries out one run, resumed if the flag is True, and yields its records."""


def run(
    plan: SweepPlan,
    run_one: RunOne,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """Carry out a sweep and yield its records as they are measured.

    Args:
        plan: From :func:`prunekit.runs.sweep.plan.plan`.
        run_one: Carries out one run; called in a worker process, so it has to pickle.
        resume: Continue in an output folder that a stopped sweep left.
        overwrite: Replace an output folder.
        stop: Called after each record; True stops the sweep.

    Raises:
        StoppedError: ``stop()`` returned True.
        PrunekitError: The run that the message names failed; the output folder can be resumed.
    """
    output = OutputFolder(plan.folder, shards=0)
    try:
        output.begin(
            job_identity(plan), resume=resume, overwrite=overwrite, writes=[*reports.FILES, STATUS]
        )
        yield from stoppable(_records(plan, run_one, output, resume=resume), stop)
    finally:
        output.close()


def _records(
    plan: SweepPlan, run_one: RunOne, output: OutputFolder, *, resume: bool
) -> Iterator[Record]:
    began = time.perf_counter()
    first = plan.first.config
    source = str(plan.first.checkpoint.folder)
    dense = yield from _measured(plan, output, "dense", source, first)
    yield from _side_by_side(plan, run_one, output, resume=resume)
    runs = []
    for number, (name, one) in enumerate(plan.runs.items(), 1):
        config = one.config.model_copy(update={"evaluate": None})
        if not _is_measured(plan, output, name):
            # Recorded before the folder is created, so that --overwrite removes it with the rest.
            output.append_journal(RUN, name, {"folder": f"runs/{name}"})
            yield Record("phase", f"{name} ({number} of {len(plan.runs)})", {"steps": 1})
            try:
                for record in run_in_subprocess(run_one, config, resume):
                    if record.kind != "finish":
                        yield record
            except PrunekitError as error:
                raise type(error)(f"{name}: {error}") from error
        facts = yield from _measured(plan, output, name, config.output.path, one.config)
        runs.append(run_entry(plan, name, facts, dense))
        if not plan.config.sweep.keep:
            remove_weights(Path(config.output.path))
    seconds = {"total": time.perf_counter() - began}
    report = sweep_report(plan, dense, runs) | {"seconds": seconds}
    reports.write(report, plan.folder)
    yield Record("finish", str(plan.folder), report)


def _side_by_side(
    plan: SweepPlan, run_one: RunOne, output: OutputFolder, *, resume: bool
) -> Iterator[Record]:
    """Carry out and measure runs on several GPUs, if there are several."""
    todo = [name for name in plan.runs if not _is_measured(plan, output, name)]
    if (gpus := min(plan.gpus, len(todo))) < 2:
        return
    jobs: dict[str, list[Task]] = {}
    for name in todo:
        config, tokens = plan.runs[name].config, plan.config.sweep.tokens
        output.append_journal(RUN, name, {"folder": f"runs/{name}"})
        jobs[name] = [
            (run_one, (config.model_copy(update={"evaluate": None}), resume)),
            (measure, (config.output.path, config, tokens)),
        ]
    steps = {"steps": len(todo)}
    yield Record("phase", f"{len(todo)} runs on {gpus} GPUs", steps, Stage.EVALUATING)
    for ended in run_side_by_side(jobs, gpus):
        if ended is None:
            yield Record("waiting", "")
            continue
        name, place, facts = ended
        found = {"of": _fingerprint(plan, name), "facts": facts}
        output.append_journal("measured", name, found)
        if not plan.config.sweep.keep:
            remove_weights(Path(plan.runs[name].config.output.path))
        yield Record("step", f"{name}, on GPU {place}")


def job_identity(plan: SweepPlan) -> str:
    """Return the SHA-256 of the input of all runs of a sweep.

    It is that of the model, with its weights, and of the texts. Settings are left out, as those of
    each run are compared by :func:`_fingerprint`.
    """
    from prunekit._version import __version__

    checkpoint, config = plan.first.checkpoint, plan.first.config
    weights = {entry.file for entry in checkpoint.file_entries.values()}
    texts = [each.data for each in (config.calibration, config.evaluate) if each]
    tasks = tasks_of(config.evaluate)
    return digest(
        {
            "prunekit": __version__,
            "model": model_identity(checkpoint),
            "files": file_digests([*weights, *checkpoint.companions]),
            "tasks": tasks and harness_tasks.digest(tasks),
            "texts": [file_digests(filter(os.path.isabs, map(Path, data))) for data in texts],
        }
    )


def remove_weights(folder: Path) -> None:
    """Remove the weight files of a measured run, but not its report."""
    for file in owned_files(folder, read_journal(folder / JOURNAL)):
        if ".safetensors" in file.name:
            file.unlink()


def _measured(
    plan: SweepPlan, output: OutputFolder, name: str, folder: str, config: Config | StructuredConfig
) -> Iterator[Record]:
    """Return the facts of a model, from the journal or a worker."""
    yield Record("phase", f"measure {name}", {"steps": 1}, Stage.EVALUATING)
    if _is_measured(plan, output, name):
        facts = output.journal["measured", name]["facts"]
    else:
        (facts,) = run_in_subprocess(measure, folder, config, plan.config.sweep.tokens)
        output.append_journal("measured", name, {"of": _fingerprint(plan, name), "facts": facts})
    for evaluation in facts["evaluation"]:
        yield Record("evaluation", name, {**evaluation, "which": name})
    return facts


def _is_measured(plan: SweepPlan, output: OutputFolder, name: str) -> bool:
    """Return whether the journal has facts for the same settings."""
    known = output.journal.get(("measured", name))
    return known is not None and known["of"] == _fingerprint(plan, name)


def _fingerprint(plan: SweepPlan, name: str) -> dict[str, Any]:
    """Return all settings on which the facts of a model depend."""
    dense = {key: plan.first.config.dump()[key] for key in ("model", "evaluate")}
    config = dense if name == "dense" else plan.runs[name].config.dump()
    return {"config": config, "tokens": plan.config.sweep.tokens}
