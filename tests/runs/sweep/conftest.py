"""Fixtures for sweeps: a tiny model, and runs without worker processes."""

from collections.abc import Iterator

import pytest

from prunekit.reports import report
from prunekit.runs.sweep import run
from tests.support import checkpoints


@pytest.fixture(scope="package")
def llama(tmp_path_factory):
    """A checkpoint with two blocks."""
    return checkpoints.write(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def in_process(monkeypatch):
    """Execute runs in this process, since workers take seconds to start, without their pages.

    The fixture value lists the names of the called functions.
    """
    called = []

    def call(function, *arguments) -> Iterator[object]:
        called.append(function.__name__)
        return function(*arguments)

    render = report.render
    monkeypatch.setattr(run, "run_in_subprocess", call)
    monkeypatch.setattr(
        report, "render", lambda made: render(made) if made["kind"] == "sweep" else ""
    )
    return called
