"""Files are written completely or not at all."""

import json
import os

import pytest
import torch

from prunekit.checkpoint.atomic import json_bytes, write_atomically
from prunekit.checkpoint.safetensors_writer import write_shard


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
