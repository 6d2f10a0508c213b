"""Progress follows a run and says little, and nothing wrong."""

import io
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from rich.console import Console

from prunekit.cli import progress
from tests.conftest import ROOT

EXAMPLE = json.loads((ROOT / "tests/support/example_report.json").read_text())


@dataclass(frozen=True)
class Record:
    """What ``prunekit.run.Record`` is to a reader."""

    kind: str
    name: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def run(first=0):
    """Yield the records of a run of three blocks, of which ``first`` are done already."""
    yield Record("start", "run", {"blocks": 3, "linears": 21, "tokens": 16384})
    yield Record("phase", "calibrate", {"steps": 1})
    yield Record("step", "tokens")
    yield Record("phase", "evaluate before", {"steps": 2})
    yield from (Record("step", f"window {i}") for i in range(2))
    yield Record("evaluation", "test.txt", evaluation("before", 20.7031))
    yield Record("phase", "prune", {"steps": 3})
    for index in range(first, 3):
        for entry in EXAMPLE["layers"][7 * index : 7 * index + 7]:
            yield Record("layer", entry["name"], entry)
        name = f"model.layers.{index}"
        yield Record(
            "block", name, {"index": index, "seconds": 2.0, "file": f"{index}.safetensors"}
        )
    yield Record("evaluation", "test.txt", evaluation("after", 27.114))
    yield Record("finish", "run", EXAMPLE)


def evaluation(which, value):
    return {"data": "test.txt", "metric": "perplexity", "which": which, "value": value}


def console(**options):
    return Console(file=io.StringIO(), width=100, **options)


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_a_phase_a_block_and_an_evaluation(clock):
    screen = console()
    assert progress.display(run(), screen) is EXAMPLE
    lines = [line.rstrip() for line in screen.file.getvalue().splitlines()]
    assert lines[:8] == [
        "calibrate",
        "evaluate before",
        "perplexity before: 20.70 (test.txt)",
        "prune",
        "  model.layers.0: 2.00 s; 1/3, 0:00:00 elapsed, 0:00:00 left",
        "  model.layers.1: 2.00 s; 2/3, 0:00:00 elapsed, 0:00:00 left",
        "  model.layers.2: 2.00 s; 3/3, 0:00:00 elapsed, 0:00:00 left",
        "perplexity after: 27.11 (test.txt)",
    ]
    assert "\x1b" not in screen.file.getvalue()


def test_the_end_is_a_summary():
    screen = console()
    progress.display(run(), screen)
    end = [" ".join(line.split()) for line in screen.file.getvalue().splitlines()[8:]]
    assert end == [
        "sparsity 50.0 %, 2:4 in 21 layers",
        "perplexity 20.70 → 27.11 (+31.0 %), wikitext2-test.txt",
        "perplexity 6.41 → 7.02 (+9.5 %), tinystories-valid.txt",
        "time 1 min 35 s",
        "peak memory 912 MB",
        "output out/smollm2-2of4",
    ]


def test_a_text_shorter_than_asked_for_is_said():
    read = {"samples": 1, "length": 26, "description": "1 window of 26 tokens"}
    asked = {"config": {"calibration": {"samples": 4, "length": 64}}}
    screen = console()
    screen.print(progress.summary_table(EXAMPLE | asked | {"calibration": read}))
    assert "calibration  less than configured: 1 window of 26 tokens" in screen.file.getvalue()


def test_notes_are_said_at_the_end_but_not_all_of_many():
    screen = console()
    notes = [f"layer {number} stays dense." for number in range(9)]
    screen.print(progress.summary_table(EXAMPLE | {"notes": notes}))
    said = screen.file.getvalue()
    assert "note         layer 0 stays dense." in said
    assert "and 4 more in report.json" in said
    assert "layer 5" not in said


def test_quiet_writes_nothing():
    for screen in (console(), console(force_terminal=True)):
        assert progress.display(run(), screen, quiet=True) is EXAMPLE
        assert screen.file.getvalue() == ""


def test_a_terminal_gets_a_display_that_goes_away():
    screen = console(force_terminal=True, legacy_windows=False)
    assert progress.display(run(), screen) is EXAMPLE
    text = screen.file.getvalue()
    assert "\x1b[?25l" in text, "no live display"
    assert text.rstrip("\n").splitlines()[-1].split()[0].endswith("output")
    assert "perplexity after: 27.11" in text


def test_names_are_not_read_as_markup():
    screen = console()
    hostile = [Record("phase", "[bold]x[/nope]", {"steps": 1}), Record("finish", "run", EXAMPLE)]
    progress.display(hostile, screen)
    assert "[bold]x[/nope]" in screen.file.getvalue()


def test_the_board_shows_phase_layer_and_error():
    state = progress.RunState(start=0)
    for record in list(run())[:12]:
        state.update(record)
    screen = console()
    screen.print(progress.LiveDisplay(state))
    text = screen.file.getvalue()
    assert "prune" in text
    assert "0/3" in text
    assert "model.layers.0.self_attn.o_proj  relative error 0." in text


def test_time_left_is_that_of_the_steps_seen(clock):
    state = progress.RunState(start=0)
    records = [record for record in run() if record.kind in {"start", "phase", "block"}]
    for record in records[:-3]:
        state.update(record)
    assert state.remaining is None
    clock[0] = 10.0
    state.update(records[-3])
    assert state.remaining == pytest.approx(20.0)


def test_a_resumed_run_does_not_count_old_blocks_as_fast_ones(clock):
    state = progress.RunState(start=0)
    records = [record for record in run(first=1) if record.kind in {"start", "phase", "block"}]
    for record in records[:-2]:
        state.update(record)
    clock[0] = 10.0
    state.update(records[-2])
    assert (state.done, state.steps) == (2, 3)
    assert state.remaining == pytest.approx(10.0)


@pytest.mark.parametrize("terminal", [False, True])
def test_an_error_of_the_run_passes_through(terminal):
    def broken():
        yield Record("phase", "prune", {"steps": 3})
        raise MemoryError

    screen = console(force_terminal=terminal, legacy_windows=False)
    with pytest.raises(MemoryError):
        progress.display(broken(), screen)
    assert screen.file.getvalue().count("\x1b[?25l") == screen.file.getvalue().count("\x1b[?25h")


def test_records_without_an_end_are_an_error():
    with pytest.raises(ValueError, match="finish"):
        progress.display([Record("phase", "prune", {"steps": 1})], console())


def training_steps():
    """Yield the records of a training of 100 steps, validated at every second record."""
    yield Record("start", "run", {"blocks": 3, "linears": 21, "tokens": 16384})
    yield Record("phase", "train", {"steps": 100})
    for step in (0, 10, 20, 30):
        held_out = 2.5 - step / 100 if step % 20 == 0 else None
        name = f"step {step}" + (f", held out {held_out}" if held_out else "")
        yield Record("step", name, {"done": step, "held_out": held_out})


def test_time_left_of_a_training_is_that_of_its_steps(clock):
    state = progress.RunState(start=0)
    for record in training_steps():
        state.update(record)
        clock[0] += 1.0
    clock[0] = 30.0
    assert (state.done, state.steps) == (30, 100)
    assert state.remaining == pytest.approx(70.0, abs=3)
    screen = console()
    screen.print(progress.LiveDisplay(state))
    assert "30/100" in screen.file.getvalue()


def test_a_log_gets_a_line_for_each_validation_of_a_training(clock):
    screen = console()
    losses = {"base": 2.0, "post": None, "final": 2.25, "steps": 30}
    end = Record("finish", "run", EXAMPLE | {"training": losses})
    progress.display([*training_steps(), end], screen)
    lines = [line.rstrip() for line in screen.file.getvalue().splitlines()]
    assert lines[:3] == [
        "train",
        "  step 0, held out 2.5; 0/100, 0:00:00 elapsed",
        "  step 20, held out 2.3; 20/100, 0:00:00 elapsed, 0:00:00 left",
    ]
    assert "training     30 steps, held-out loss 2.00 → 2.25" in lines
