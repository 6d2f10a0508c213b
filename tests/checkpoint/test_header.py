"""Headers of safetensors files: truncated, broken and impossible ones are refused."""

import json
import struct

import pytest
import torch

from prunekit.checkpoint.header import read_header
from prunekit.checkpoint.reader import Checkpoint, open_checkpoint
from prunekit.checkpoint.weight_files import WEIGHTS_FILE
from prunekit.errors import CheckpointError
from tests.support import readers


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


LAYOUTS = {
    "F8_E4M3": (8, torch.float8_e4m3fn), "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E8M0": (8, torch.float8_e8m0fnu), "C64": (64, torch.complex64), "U16": (16, torch.uint16),
    "U32": (32, torch.uint32), "U64": (64, torch.uint64), "F6_E2M3": (6, None),
    "F6_E3M2": (6, None), "BF16": (16, torch.bfloat16), "BOOL": (8, torch.bool),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_tensors_of_every_data_type_of_the_format_are_listed(tmp_path, name):
    bits, dtype = LAYOUTS[name]
    table = {"x": {"dtype": name, "shape": [2, 4], "data_offsets": [0, bits]}}
    file = tmp_path / "a.safetensors"
    file.write_bytes(readers.framed(json.dumps(table).encode(), data=bytes(bits)))
    entry = read_header(file)["x"]
    assert (entry.shape, entry.nbytes) == ((2, 4), bits)
    assert entry.unreadable == ("" if dtype else name)
    opened = Checkpoint(tmp_path, {}, {"x": entry}, {"x": entry})
    if dtype:
        assert opened.check_copyable() == []
        assert opened.read(["x"])["x"].dtype == entry.dtype == dtype
        return
    for use in (lambda: opened.read(["x"]), opened.check_copyable):
        with pytest.raises(CheckpointError, match=rf"x: has the data type {name}, which torch"):
            use()


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be read \(No such file"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("message", "edit"), BAD_OFFSETS.values(), ids=BAD_OFFSETS)
def test_offsets_that_cannot_be_are_refused(single, message, edit):
    norms = [f"model.layers.{block}.input_layernorm.weight" for block in range(2)]
    rewrite_header(single / WEIGHTS_FILE, lambda header: edit(*(header[name] for name in norms)))
    with pytest.raises(CheckpointError, match=rf"{single / WEIGHTS_FILE}: .*{message}"):
        open_checkpoint(single)


UNOPENED = {
    "a gap": lambda table, data: (json.dumps(table).encode(), data + bytes(8)),
    "a hole": lambda table, data: (json.dumps({"b": table["b"]}).encode(), data),
    "metadata of numbers": lambda table, data: (
        json.dumps({"__metadata__": {"format": 1}, **table}).encode(), data,
    ),
    "UTF-16": lambda table, data: (json.dumps(table).encode("utf-16"), data),
    "half a surrogate pair": lambda table, data: (
        json.dumps({"\ud800": table["a"], "b": table["b"]}).encode(), data,
    ),
}  # fmt: skip


@pytest.mark.parametrize("spoil", UNOPENED.values(), ids=UNOPENED)
def test_a_file_that_safetensors_cannot_open_is_refused_at_once(tmp_path, spoil):
    """And not only when its tensors are read, in the middle of a run."""
    table = {
        name: {"dtype": "U8", "shape": [4], "data_offsets": [start, start + 4]}
        for name, start in (("a", 0), ("b", 4))
    }
    file = tmp_path / "a.safetensors"
    header, data = spoil(table, bytes(8))
    file.write_bytes(readers.framed(header, data=data))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: (safetensors cannot|its header)"):
        read_header(file)
