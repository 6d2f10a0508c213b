"""Joined files: the bytes that the library writes, without its memory."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunekit.checkpoint import joined_file
from prunekit.checkpoint.header import read_header
from prunekit.checkpoint.joined_file import write_joined
from prunekit.errors import CheckpointError

TENSORS = {
    "wide": torch.arange(6, dtype=torch.float64).reshape(2, 3),
    "z.weight": torch.randn(3, 5),
    "a.weight": torch.randn(7),
    "half": torch.randn(9).bfloat16(),
    "naïve « names »": torch.arange(5, dtype=torch.uint8),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def entries(tmp_path):
    """Entries of the tensors in two files, in no particular order."""
    names = [*TENSORS]
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: TENSORS[name] for name in part}, tmp_path / f"{number}.safetensors")
    found = read_header(tmp_path / "1.safetensors") | read_header(tmp_path / "0.safetensors")
    assert found.keys() == TENSORS.keys()
    return found


@pytest.mark.parametrize("chunk", [3, joined_file.CHUNK_BYTES])
def test_the_bytes_are_those_of_the_library(entries, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(joined_file, "CHUNK_BYTES", chunk)
    digest = write_joined(tmp_path / "joined.safetensors", entries)
    save_file(TENSORS, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "joined.safetensors").read_bytes()
    assert content == (tmp_path / "expected.safetensors").read_bytes()
    assert digest == hashlib.sha256(content).hexdigest()


def test_types_of_one_width_are_kept_apart(tmp_path):
    """The library sorts them in another order; what counts is that each value is found."""
    held = {
        "a": torch.ones(3).half(), "b": torch.ones(3).bfloat16(), "c": torch.ones(3).short(),
        "d": torch.ones(3).to(torch.float8_e4m3fn), "e": torch.ones(3, dtype=torch.bool),
    }  # fmt: skip
    save_file(held, tmp_path / "0.safetensors")
    write_joined(tmp_path / "joined", read_header(tmp_path / "0.safetensors"))
    found = load_file(tmp_path / "joined")
    for name, value in held.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8))


def test_a_file_that_was_cut_off_meanwhile_leaves_nothing(entries, tmp_path):
    source = entries["z.weight"].file
    source.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{source}: was cut off"):
        write_joined(tmp_path / "joined.safetensors", entries)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]
