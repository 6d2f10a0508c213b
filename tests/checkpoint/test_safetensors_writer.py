"""Weight files: the bytes that the library writes, without its memory, and their digest."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunekit.checkpoint import safetensors_writer
from prunekit.checkpoint.header import DTYPES, read_header
from prunekit.checkpoint.safetensors_writer import write_joined, write_shard
from prunekit.errors import CapacityError, CheckpointError

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


@pytest.mark.parametrize("chunk", [3, safetensors_writer.CHUNK_BYTES])
def test_the_bytes_are_those_of_the_library(entries, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(safetensors_writer, "CHUNK_BYTES", chunk)
    digest = write_joined(tmp_path / "joined.safetensors", entries)
    save_file(TENSORS, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "joined.safetensors").read_bytes()
    assert content == (tmp_path / "expected.safetensors").read_bytes()
    assert digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("chunk", [3, safetensors_writer.CHUNK_BYTES])
def test_a_shard_is_hashed_while_it_is_written(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(safetensors_writer, "CHUNK_BYTES", chunk)
    digest = write_shard(tmp_path / "shard", TENSORS)
    save_file(TENSORS, tmp_path / "expected", metadata={"format": "pt"})
    content = (tmp_path / "shard").read_bytes()
    assert content == (tmp_path / "expected").read_bytes()
    assert digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if dtype])
def test_a_shard_has_the_bytes_of_the_library_whatever_its_type(tmp_path, dtype):
    held = {"b": torch.arange(16, dtype=torch.uint8).view(dtype), "a": torch.zeros(2)}
    write_shard(tmp_path / "shard", held)
    save_file(held, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "shard").read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_shard_reads_as_it_was_written(tmp_path):
    whole = torch.randn(4, 6)
    held = {"a": whole.T, "b": torch.arange(3), "c": torch.tensor(1.0).bfloat16(), "d": whole[1:]}
    write_shard(tmp_path / "a.safetensors", held)
    found = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in held.items())
    assert read_header(tmp_path / "a.safetensors").keys() == held.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize(
    "failing",
    ["prunekit.checkpoint.safetensors_writer._chunks", "os.fsync", "pathlib.Path.replace"],
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
