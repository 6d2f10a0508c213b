"""Files are written completely or not at all."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from prunekit.checkpoint.atomic import json_bytes, write_atomically, write_shard
from prunekit.checkpoint.header import read_header
from prunekit.errors import CapacityError


def test_a_shard_reads_as_it_was_written(tmp_path):
    held = {"a": torch.randn(4, 6).T, "b": torch.arange(3), "c": torch.tensor(1.0).bfloat16()}
    write_shard(tmp_path / "a.safetensors", held)
    found = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in held.items())
    assert read_header(tmp_path / "a.safetensors").keys() == held.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize(
    "failing", ["safetensors.torch.save_file", "os.fsync", "pathlib.Path.replace"]
)
def test_a_shard_that_fails_leaves_what_was_there(tmp_path, monkeypatch, before, failing):
    file = tmp_path / "a.safetensors"
    if before:
        file.write_bytes(before)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with pytest.raises(CapacityError, match="disk is full"):
            write_shard(file, {"a": torch.zeros(3)})
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_get_the_permissions_that_the_user_wants(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_shard(tmp_path / "a", {"a": torch.zeros(1)})
        write_atomically(tmp_path / "b", b"b")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~mask}


def test_json_may_hold_half_a_surrogate_pair():
    content = {"a": "\ud800", "é": ["\udcff.txt"]}
    assert json.loads(json_bytes(content)) == content
    assert "é".encode() in json_bytes(content)
