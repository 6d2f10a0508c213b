"""Output folder: resume, overwrite, the lock, and the finished checkpoint."""

import json

import pytest
import torch

from prunekit.checkpoint.journal import JOURNAL
from prunekit.checkpoint.output import OutputFolder
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import CheckpointError, ConfigError
from tests.support import checkpoints


def begun(folder, fingerprint="f", *, resume=False, overwrite=False):
    output = OutputFolder(folder, 1)
    try:
        output.begin(fingerprint, resume=resume, overwrite=overwrite)
    except ConfigError:
        output.close()
        raise
    return output


def test_a_resumed_run_knows_its_journal(tmp_path):
    output = begun(tmp_path / "out")
    output.append_journal("allocation", "owl", {"a": 1})
    output.close()
    resumed = begun(tmp_path / "out", resume=True)
    assert resumed.journal["allocation", "owl"] == {"a": 1}
    resumed.close()


def test_a_truncated_line_and_temporary_files_are_discarded(tmp_path):
    folder = tmp_path / "out"
    output = begun(folder)
    output.append_journal("allocation", "owl", {"a": 1})
    output.close()
    complete = (folder / JOURNAL).read_bytes()
    (folder / JOURNAL).write_bytes(complete + b'{"kind": "bl')
    for name in ("shard-00001-of-00001.safetensors", JOURNAL):
        (folder / f".{name}.tmp").touch()
    resumed = begun(folder, resume=True)
    resumed.close()
    assert (folder / JOURNAL).read_bytes() == complete
    assert [path.name for path in folder.iterdir()] == [JOURNAL]


def test_a_block_whose_shard_has_changed_is_repeated(tmp_path):
    output = begun(tmp_path / "out")
    files = output.write_shard(1, {"a": torch.zeros(3)})
    output.append_journal("block", "0", {"files": dict.fromkeys(files, "0" * 64)})
    output.append_journal("block", "1", {"files": files})
    output.append_journal("block", "2", {"files": {**files, "gone": "0"}})
    output.close()
    resumed = begun(tmp_path / "out", resume=True)
    assert ("block", "0") not in resumed.journal
    assert ("block", "1") in resumed.journal
    assert ("block", "2") not in resumed.journal
    resumed.close()


def test_another_config_cannot_resume_but_overwrite(tmp_path):
    begun(tmp_path / "out", "one").close()
    with pytest.raises(ConfigError, match="was begun with another config"):
        begun(tmp_path / "out", "two", resume=True)
    output = begun(tmp_path / "out", "two", overwrite=True)
    assert output.journal["start", ""]["fingerprint"] == "two"
    output.close()


def test_two_runs_cannot_write_to_one_folder(tmp_path):
    output = begun(tmp_path / "out")
    with pytest.raises(ConfigError, match="another run is writing to"):
        begun(tmp_path / "out", resume=True)
    output.close()


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_prunekit_did_not_write_are_never_deleted(tmp_path, overwrite):
    (tmp_path / "thesis.txt").touch()
    message = "does not delete them" if overwrite else "is not empty; choose another"
    with pytest.raises(ConfigError, match=message):
        begun(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").exists()


def test_a_finished_folder_is_a_checkpoint(single, tmp_path):
    checkpoint = open_checkpoint(single)
    output = begun(tmp_path / "out")
    tensors = checkpoint.read(checkpoint.entries)
    output.write_shard(1, tensors)
    assert not (tmp_path / "out" / "config.json").exists()
    output.finish(checkpoint, "float32")
    output.close()
    found = open_checkpoint(tmp_path / "out")
    assert found.entries.keys() == checkpoint.entries.keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    read = found.read(found.entries)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert found.companion_names.keys() == checkpoint.companion_names.keys()


def test_a_finished_folder_names_no_code_and_no_weights_of_the_input(single, tmp_path):
    (single / "model.safetensors").rename(single / "x.safetensors")
    checkpoints.configure(
        single, auto_map={"AutoModel": "x.X"}, transformers_weights="x.safetensors"
    )
    for name in ("adapter_config.json", "old.index.json", "x.py", "additional_chat_templates/a.py"):
        (single / name).parent.mkdir(exist_ok=True)
        (single / name).write_text("{}")
    (single / "additional_chat_templates/rag.jinja").write_text("x")
    (single / "LICENSE").write_text("x")
    settings = single / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"auto_map": ["x.X", None]}))
    checkpoint = open_checkpoint(single)
    output = begun(tmp_path / "out")
    output.write_shard(1, checkpoint.read(checkpoint.entries))
    output.finish(checkpoint, None)
    output.close()
    for name in ("config.json", "tokenizer_config.json"):
        assert (
            not {"auto_map", "transformers_weights"}
            & json.loads((tmp_path / "out" / name).read_text()).keys()
        )
    written = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")
    }
    assert {"LICENSE", "additional_chat_templates/rag.jinja"} <= written
    assert not {"adapter_config.json", "old.index.json", "x.py", "text.txt"} & written
    assert "additional_chat_templates/a.py" not in written


def test_nothing_is_written_to_a_folder_that_took_the_place_of_the_output(single, tmp_path):
    """Such as the model's own, by a link."""
    held = {path.name: path.read_bytes() for path in single.iterdir()}
    output = begun(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "out").symlink_to(single)
    for write in (
        lambda: output.write_shard(1, {"a": torch.zeros(3)}),
        lambda: output.append_journal("block", "0", {}),
        lambda: output.finish(open_checkpoint(single), None),
    ):
        with pytest.raises(CheckpointError, match="was moved, removed or replaced"):
            write()
    output.close()
    assert {path.name: path.read_bytes() for path in single.iterdir()} == held


def test_shards_whose_number_is_known_late_belong_to_the_run(tmp_path):
    """A kill before the entry of a shard leaves it, and its unfinished file."""
    folder = tmp_path / "out"
    for resume in (False, True):
        output = OutputFolder(folder, 0)
        output.begin("same", resume=resume, overwrite=False)
        output.announce_shards(2)
        assert output.journal["shards", ""]["writes"] == [
            "shard-00001-of-00002.safetensors",
            "shard-00002-of-00002.safetensors",
        ]
        (output.folder / ".shard-00002-of-00002.safetensors.tmp").touch()
        output.write_shard(1, {"weight": torch.ones(2)})
        output.close()
        assert len((folder / "journal.jsonl").read_text().splitlines()) == 2
    again = OutputFolder(folder, 0)
    again.begin("other", resume=False, overwrite=True)
    again.close()
    assert [path.name for path in folder.iterdir()] == ["journal.jsonl"]
