"""Fixtures of tests of sweeps: a tiny model, and runs without worker processes."""

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
    """Carry out runs in this process, as a worker takes seconds to import torch.

    The fixture lists the names of the functions that were called.
    """
    called = []

    def call(function, *arguments) -> Iterator[object]:
        called.append(function.__name__)
        return function(*arguments)

    monkeypatch.setattr(run, "run_in_subprocess", call)
    return called
