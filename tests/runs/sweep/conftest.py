"""Fixtures for sweeps: a tiny model, and runs without worker processes."""

from collections.abc import Iterator

import pytest

from prunekit.runs.sweep import run
from tests.support import checkpoints


@pytest.fixture(scope="package")
def llama(tmp_path_factory):
    """A checkpoint with two blocks."""
    return checkpoints.write(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def in_process(monkeypatch):
    """Execute runs in this process, since workers take seconds to start.

    The fixture value lists the names of the called functions.
    """
    called = []

    def call(function, *arguments) -> Iterator[object]:
        called.append(function.__name__)
        return function(*arguments)

    monkeypatch.setattr(run, "run_in_subprocess", call)
    return called
