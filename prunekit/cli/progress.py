"""Progress display of a run, driven by its stream of records.

A terminal gets a live display; a log file or CI gets one plain line per phase, block, validation of
a training, and evaluation. Both end with a summary of the report.
"""

import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from prunekit import formatting
from prunekit.cli.app import is_verbose
from prunekit.cli.console import console as default_console

if TYPE_CHECKING:
    from prunekit.runs.record import Record

MAX_NOTES = 5


def display(
    records: "Iterable[Record]", console: Console | None = None, *, quiet: bool = False
) -> dict[str, Any]:
    """Display a run until it ends and return its report.

    Args:
        records: Iterator of ``prunekit.run``; consuming it drives the run.
        console: Console to write to; standard error if None, which leaves standard output free.
        quiet: Write nothing.

    Raises:
        ValueError: The records ended without a "finish" record.
    """
    console = console or default_console(stderr=True)
    state = RunState(start=time.monotonic())
    live = console.is_terminal and not quiet
    screen = Live(LiveDisplay(state), console=console, transient=True) if live else nullcontext()
    try:
        with screen:
            for record in records:
                state.update(record)
                line = _log_line(state, record, live=live) or _layer_line(record)
                if line and not quiet:
                    console.print(line, highlight=False)
    finally:  # a run may be finished, and then fail by its [gates]
        if state.report is not None and not quiet:
            console.print((sweep_table if "runs" in state.report else summary_table)(state.report))
    if state.report is None:
        raise ValueError('the records ended without a "finish" record')
    return state.report


@dataclass
class RunState:
    """Progress of a run so far.

    Attributes:
        start: Start of the run, by ``time.monotonic``.
        phase: Name of the current phase.
        steps: Steps of the phase; blocks in the phase "prune".
        done: Finished steps of the phase.
        blocks: Blocks of the model.
        skipped: Steps of the phase that an earlier, resumed run had finished.
        layer: Name of the layer or step that finished last.
        error: Relative error of that layer, if measured.
        began: Start of the phase, by ``time.monotonic``.
        report: Report of the run, once it has finished.
    """

    start: float
    phase: str = ""
    steps: int = 0
    done: int = 0
    blocks: int = 0
    skipped: int = 0
    layer: str = ""
    error: float | None = None
    began: float = 0.0
    report: dict[str, Any] | None = None

    def update(self, record: "Record") -> None:
        """Update the state from one record."""
        values = record.values
        match record.kind:
            case "start":
                self.blocks = values["blocks"]
            case "phase":
                self.phase, self.done, self.skipped = record.name, 0, 0
                self.steps = self.blocks if record.name == "prune" else values["steps"]
                self.layer, self.error, self.began = "", None, time.monotonic()
            case "step" if self.phase != "prune":
                self.layer, self.done = record.name, values.get("done", self.done + 1)
            case "layer":
                self.layer, self.error = record.name, values.get("relative_error")
            case "block":
                self.skipped += values["index"] - self.done
                self.done = values["index"] + 1
            case "finish":
                self.report = values

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.start

    @property
    def remaining(self) -> float | None:
        """Estimated seconds until the phase ends; None before its first step."""
        timed = self.done - self.skipped
        return (self.steps - self.done) * (time.monotonic() - self.began) / timed if timed else None


class LiveDisplay:
    """Live display: phase, progress bar, time and the current layer."""

    def __init__(self, state: RunState) -> None:
        self.state = state
        self.spinner = Spinner("dots", style="cyan")

    def __rich__(self) -> Group:
        state = self.state
        bar = ProgressBar(total=max(state.steps, 1), completed=state.done, width=30)
        top = Table.grid(padding=(0, 1))
        top.add_row(self.spinner, Text(state.phase, "bold"), bar, Text(_progress(state)))
        error = "" if state.error is None else f"  relative error {formatting.number(state.error)}"
        bottom = Text(f"  {state.layer}{error}", "dim", no_wrap=True, overflow="ellipsis")
        return Group(top, bottom)


def summary_table(report: dict[str, Any]) -> Table:
    """Return a table of a run's main results."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    memory = report.get("memory") or {}
    rows = [
        *_sparsity_rows(report),
        *map(_evaluation_row, report.get("evaluation") or []),
        *map(_gate_row, report.get("gates") or []),
        *_training_rows(report.get("training")),
        ("time", formatting.duration((report.get("seconds") or {}).get("total"))),
        ("peak memory", formatting.size(memory.get("peak_rss_bytes"))),
    ]
    if memory.get("peak_device_bytes"):
        rows.append(("on the device", formatting.size(memory["peak_device_bytes"])))
    if folder := (report.get("config", {}).get("output") or {}).get("path"):
        rows.append(("output", str(folder)))
    rows += [*_calibration_shortfall(report), *_note_rows(report.get("notes") or [])]
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def _sparsity_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows for the removed units and parameters, or for the zeros."""
    sparsity = report["sparsity"]
    if "removed" in sparsity:
        removed = sparsity["removed"].items()
        rows = [(kind, f"{total:,} → {total - gone:,}") for kind, (gone, total) in removed]
        before, after = map(formatting.count, sparsity["parameters"])
        return [*rows, ("parameters", f"{before} → {after}")]
    zeros = formatting.percent(sparsity["achieved"])
    pattern = sparsity.get("pattern", "unstructured")
    return [("sparsity", f"{zeros}, {pattern} in {len(report['layers']):,} layers")]


def _evaluation_row(result: dict[str, Any]) -> tuple[str, str]:
    metric, before, after = result["metric"], result.get("before"), result.get("after")
    values = f"{formatting.measured(metric, before)} → {formatting.measured(metric, after)}"
    return (
        metric,
        f"{values} ({formatting.measured_change(metric, before, after)}), {result['data']}",
    )


def _gate_row(gate: dict[str, Any]) -> tuple[str, str]:
    achieved, asked = formatting.number(gate["achieved"]), formatting.number(gate["asked"])
    verdict = "met" if gate["met"] else "NOT MET"
    return f"gate {gate['name']}", f"{verdict}: {achieved} of at most {asked}; {gate['where']}"


def _training_rows(training: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return a row of steps and held-out losses."""
    if not training:
        return []
    losses = [training[key] for key in ("base", "post", "final") if training[key] is not None]
    shown = " → ".join(map(formatting.number, losses))
    return [("training", f"{training['steps']:,} steps, held-out loss {shown}")]


def _note_rows(notes: list[str]) -> list[tuple[str, str]]:
    """Return rows for the first notes and the number of omitted ones."""
    rows = [("note", note) for note in notes[:MAX_NOTES]]
    more = len(notes) - len(rows)
    return [*rows, ("", f"and {more} more in report.json")] if more else rows


def _calibration_shortfall(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a row if there was less calibration text than configured."""
    asked, read = report.get("config", {}).get("calibration"), report.get("calibration")
    if not asked or not read:
        return []
    counts = ("samples",) if asked.get("task") else ("samples", "length")  # rows end by themselves
    if all(read[key] >= asked[key] for key in counts):
        return []
    return [("calibration", f"less than configured: {read['description']}")]


def sweep_table(report: dict[str, Any]) -> Table:
    """Return a table of a sweep: the dense model and each run."""
    table = Table(caption=report["dense"]["evaluation"][0]["protocol"])
    table.add_column("run", no_wrap=True)
    results = report["dense"]["evaluation"]
    metrics = [f"{result['metric']}, {result['data']}" for result in results]
    for name in ("removed", *metrics, "parameters", "tokens/s generated", "peak memory"):
        table.add_column(name, justify="right")
    dense = {"name": "dense", "achieved": 0.0, "parameters": report["model"]["parameters"]}
    for run in (dense | report["dense"], *report["runs"]):
        table.add_row(
            run["name"],
            formatting.percent(run["achieved"]),
            *(formatting.measured(each["metric"], each["value"]) for each in run["evaluation"]),
            formatting.count(run["parameters"]),
            formatting.number(run.get("decode")),
            formatting.size(run["peak_device_bytes"] or run["peak_rss_bytes"]),
        )
    return table


def _log_line(state: RunState, record: "Record", *, live: bool) -> Text | None:
    """Return the permanent output line of a record, or None."""
    values = record.values
    if record.kind == "evaluation":
        value = formatting.measured(values["metric"], values["value"])
        return Text(f"{values['metric']} {values['which']}: {value} ({values['data']})")
    if live:
        return None
    if record.kind == "phase":
        return Text(record.name)
    if record.kind == "block":
        return Text(
            f"  {record.name}: {formatting.duration(values['seconds'])}; {_progress(state)}"
        )
    if record.kind == "step" and values.get("held_out") is not None:
        return Text(f"  {record.name}; {_progress(state)}")
    return None


def _layer_line(record: "Record") -> Text | None:
    """Return the output line of a layer with --verbose, or None."""
    if record.kind != "layer" or not is_verbose():
        return None
    error = record.values.get("relative_error")
    shown = "" if error is None else f": relative error {formatting.number(error)}"
    return Text(f"  {record.name}{shown}")


def _progress(state: RunState) -> str:
    left = "" if state.remaining is None else f", {_clock(state.remaining)} left"
    return f"{state.done}/{state.steps}, {_clock(state.elapsed)} elapsed{left}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
