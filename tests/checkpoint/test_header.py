"""Headers of safetensors files: truncated, broken and impossible ones are refused."""

import json
import struct

import pytest

from prunekit.checkpoint.reader import WEIGHTS_FILE, open_checkpoint
from prunekit.errors import CheckpointError


def rewrite_header(file, edit):
    """Rewrite the header of a safetensors file; ``edit`` changes the table or returns bytes."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    text = edit(header) or json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_named(single, kept):
    content = (single / WEIGHTS_FILE).read_bytes()
    (single / WEIGHTS_FILE).write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=rf"{single / WEIGHTS_FILE}: .*truncated"):
        open_checkpoint(single)


@pytest.mark.parametrize(
    "text", [b"{", b"\xff\xfe\xfd", b"[]", b"3", b'{"a": 1}', b'{"a": {"dtype": "F32"}}']
)
def test_a_broken_header_is_named(single, text):
    rewrite_header(single / WEIGHTS_FILE, lambda _: text)
    with pytest.raises(CheckpointError, match=rf"{single / WEIGHTS_FILE}: .*header"):
        open_checkpoint(single)


BAD_OFFSETS = {
    "beyond the end": ("bytes", lambda a, b: a.update(shape=[10**6], data_offsets=[0, 4 * 10**6])),
    "too few bytes": ("bytes", lambda a, b: a.update(data_offsets=[0, 4])),
    "negative": ("bytes", lambda a, b: a.update(data_offsets=[-4, 4 * a["shape"][0] - 4])),
    "overlap": ("overlap", lambda a, b: a.update(data_offsets=b["data_offsets"])),
    "no numbers": ("header", lambda a, b: a.update(data_offsets=["x", "y"])),
    "three": ("header", lambda a, b: a.update(data_offsets=[0, 1, 2])),
    "unknown type": ("header", lambda a, b: a.update(dtype="F3")),
    "negative shape": ("(bytes|header)", lambda a, b: a.update(shape=[-32])),
    "shape of text": ("header", lambda a, b: a.update(shape=["32"])),
}


@pytest.mark.parametrize(("message", "edit"), BAD_OFFSETS.values(), ids=BAD_OFFSETS)
def test_offsets_that_cannot_be_are_refused(single, message, edit):
    norms = [f"model.layers.{block}.input_layernorm.weight" for block in range(2)]
    rewrite_header(single / WEIGHTS_FILE, lambda header: edit(*(header[name] for name in norms)))
    with pytest.raises(CheckpointError, match=rf"{single / WEIGHTS_FILE}: .*{message}"):
        open_checkpoint(single)
