"""A run as it happens: records in, a live display out, the report at the end.

On a terminal the display moves; elsewhere (a log file, CI) each phase, block and evaluation is
one plain line.
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

if TYPE_CHECKING:
    from prunekit.runs.record import Record

NOTES_SHOWN = 5


def show(
    records: "Iterable[Record]", console: Console | None = None, *, quiet: bool = False
) -> dict[str, Any]:
    """Follow a run to its end and return its report.

    Args:
        records: What ``prunekit.run`` yields; consumed as the run goes.
        console: Where to write; standard error if None, so that standard output stays free.
        quiet: Write nothing.

    Raises:
        ValueError: The records ended before the run did.
    """
    console = console or Console(stderr=True)
    state = State(start=time.monotonic())
    live = console.is_terminal and not quiet
    screen = Live(Board(state), console=console, transient=True) if live else nullcontext()
    with screen:
        for record in records:
            state.follow(record)
            if not quiet and (line := _line(state, record, live=live)):
                console.print(line, highlight=False)
    if state.report is None:
        raise ValueError('the records ended without a "finish" record')
    if not quiet:
        console.print((compared if "runs" in state.report else summary)(state.report))
    return state.report


@dataclass
class State:
    """What is known of a run so far.

    Attributes:
        done: Steps of the phase that are over; blocks in the phase "prune".
        skipped: Steps that were over before the phase began, in a resumed run.
        start: When the run began, by ``time.monotonic``.
        began: When the phase began.
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

    def follow(self, record: "Record") -> None:
        """Take in one record."""
        values = record.values
        match record.kind:
            case "start":
                self.blocks = values["blocks"]
            case "phase":
                self.phase, self.done, self.skipped = record.name, 0, 0
                self.steps = self.blocks if record.name == "prune" else values["steps"]
                self.layer, self.error, self.began = "", None, time.monotonic()
            case "step" if self.phase != "prune":
                self.layer, self.done = record.name, self.done + 1
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
    def left(self) -> float | None:
        """Seconds until the phase ends, at the speed seen in it; None before its first step."""
        seen = self.done - self.skipped
        return (self.steps - self.done) * (time.monotonic() - self.began) / seen if seen else None


class Board:
    """The moving display of a state: phase, bar, time; below it the layer at hand."""

    def __init__(self, state: State) -> None:
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


def summary(report: dict[str, Any]) -> Table:
    """Return the few numbers a run is about."""
    sparsity, memory = report["sparsity"], report.get("memory") or {}
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")

    def add(name: str, value: str) -> None:
        table.add_row(Text(name), Text(value))

    for kind, (gone, whole) in sparsity.get("removed", {}).items():
        add(kind, f"{whole:,} → {whole - gone:,}")
    if "removed" in sparsity:
        before, after = map(formatting.count, sparsity["parameters"])
        add("parameters", f"{before} → {after}")
    else:
        zeros = (
            f"{formatting.percent(sparsity['achieved'])}, {sparsity.get('pattern', 'unstructured')}"
        )
        add("sparsity", f"{zeros} in {len(report['layers']):,} layers")
    for found in report.get("evaluation") or []:
        before, after = found.get("before"), found.get("after")
        values = f"{formatting.number(before)} → {formatting.number(after)}"
        add(found["metric"], f"{values} ({formatting.change(before, after)}), {found['data']}")
    add("time", formatting.duration((report.get("seconds") or {}).get("total")))
    add("peak memory", formatting.size(memory.get("peak_rss_bytes")))
    if memory.get("peak_device_bytes"):
        add("on the device", formatting.size(memory["peak_device_bytes"]))
    if folder := (report.get("config", {}).get("output") or {}).get("path"):
        add("output", str(folder))
    for name, value in (*_shortage(report), *_noted(report.get("notes") or [])):
        add(name, value)
    return table


def _noted(notes: list[str]) -> list[tuple[str, str]]:
    """Return rows for the first notes, and how many more there are."""
    rows = [("note", note) for note in notes[:NOTES_SHOWN]]
    more = len(notes) - len(rows)
    return [*rows, ("", f"and {more} more in report.json")] if more else rows


def _shortage(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Say of what a run was calibrated on that it is less than was asked for, if it is."""
    asked, read = report.get("config", {}).get("calibration"), report.get("calibration")
    if not asked or not read or all(read[key] >= asked[key] for key in ("samples", "length")):
        return []
    return [("calibration", f"less than asked for: {read['description']}")]


def compared(report: dict[str, Any]) -> Table:
    """Return the dense model and each run of a sweep side by side."""
    table = Table(caption=report["dense"]["evaluation"][0]["protocol"])
    table.add_column("run", no_wrap=True)
    metrics = [f"{found['metric']}, {found['data']}" for found in report["dense"]["evaluation"]]
    for name in ("gone", *metrics, "parameters", "tokens/s written", "peak memory"):
        table.add_column(name, justify="right")
    dense = {"name": "dense", "achieved": 0.0, "parameters": report["model"]["parameters"]}
    for run in (dense | report["dense"], *report["runs"]):
        table.add_row(
            run["name"],
            formatting.percent(run["achieved"]),
            *(formatting.number(found["value"]) for found in run["evaluation"]),
            formatting.count(run["parameters"]),
            formatting.number(run.get("decode")),
            formatting.size(run["peak_device_bytes"] or run["peak_rss_bytes"]),
        )
    return table


def _line(state: State, record: "Record", *, live: bool) -> Text | None:
    """Return what stays on the screen of a record, if anything does."""
    values = record.values
    if record.kind == "evaluation":
        value = formatting.number(values["value"])
        return Text(f"{values['metric']} {values['which']}: {value} ({values['data']})")
    if live:
        return None
    if record.kind == "phase":
        return Text(record.name)
    if record.kind == "block":
        return Text(
            f"  {record.name}: {formatting.duration(values['seconds'])}; {_progress(state)}"
        )
    return None


def _progress(state: State) -> str:
    left = "" if state.left is None else f", {_clock(state.left)} left"
    return f"{state.done}/{state.steps}, {_clock(state.elapsed)} so far{left}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
