"""Tiny checkpoints to read and to spoil."""

import shutil

import pytest

from tests.support import checkpoints


@pytest.fixture(scope="package")
def originals(tmp_path_factory):
    """The tiny Llama once in one file and once in shards."""
    folder = tmp_path_factory.mktemp("originals")
    checkpoints.write(folder / "single")
    checkpoints.write(folder / "sharded", shard_size="20KB")
    return folder


@pytest.fixture
def single(originals, tmp_path):
    """Return a copy of the checkpoint in one file."""
    return shutil.copytree(originals / "single", tmp_path / "single")


@pytest.fixture
def sharded(originals, tmp_path):
    """Return a copy of the checkpoint in shards."""
    return shutil.copytree(originals / "sharded", tmp_path / "sharded")
