"""Fixtures for structured runs: a tiny model and a finished run."""

import pytest

from tests.support import checkpoints
from tests.support.structured import BOTH, finished


@pytest.fixture(scope="package")
def llama(tmp_path_factory):
    """A checkpoint with three blocks of four heads."""
    folder = tmp_path_factory.mktemp("llama")
    return checkpoints.write(folder, num_hidden_layers=3, num_key_value_heads=4)


@pytest.fixture(scope="package")
def shrunk(llama, tmp_path_factory):
    """Folder and report of an uninterrupted run; treat its files as read-only."""
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, finished(llama, folder, BOTH)
