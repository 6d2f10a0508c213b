"""Uploads to a stand-in of the hub."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from prunekit.checkpoint import adapter
from prunekit.checkpoint.push import check_can_push, published_files, push, renamed_files
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import CheckpointError, ConfigError, HubError
from tests.support import checkpoints
from tests.support.hub_server import TOKEN, hub_server


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_server(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def folder(tmp_path):
    """A finished folder of several weight files with all that a run may leave."""
    made = checkpoints.write(tmp_path / "pruned", shard_size="30KB")
    (made / "README.md").write_text('from_pretrained("pruned")\n')
    (made / adapter.FOLDER).mkdir()
    (made / adapter.FOLDER / adapter.CONFIG).write_text('{"r": 2, "base_model_name_or_path": "x"}')
    for name in ("report.json", "report.html", "calibration.json", "LICENSE"):
        (made / name).write_text(name)
    return made


def test_a_checkpoint_arrives_whole_and_names_its_repository(hub, folder):
    check_can_push("org/model", "output.push")
    url = push(folder, "org/model", private=True)
    assert url == f"{hub.url}/org/model/commit/1"
    (created,) = hub.created
    assert created["name"] == "model"
    assert created["organization"] == "org"
    assert created.get("private") or created.get("visibility") == "private"
    arrived = hub.folder / "org/model"
    checkpoints.same_bytes(arrived, folder)
    assert open_checkpoint(arrived).companion_names.keys() >= {"LICENSE", "tokenizer.json"}
    assert (arrived / "README.md").read_text() == 'from_pretrained("org/model")\n'
    config = json.loads((arrived / adapter.FOLDER / adapter.CONFIG).read_text())
    assert config == {"r": 2, "base_model_name_or_path": "org/model"}
    names = {path.name for path in arrived.rglob("*")}
    assert not names & {"report.json", "report.html", "calibration.json", "text.txt"}
    push(folder, "org/model", reports=True)
    assert hub.commits == 2
    assert (arrived / "report.json").read_text() == "report.json"


def test_weights_of_an_earlier_upload_are_removed_in_the_same_commit(hub, folder):
    """Other tools would open them with the config of the new ones."""
    there = hub.folder / "org/model"
    old = [
        "model.safetensors", "model-00001-of-00099.safetensors", "pytorch_model.bin",
        "pytorch_model.bin.index.json", "adapter_config.json", "adapter/adapter_model.safetensors",
        "adapter/notes.md",
    ]  # fmt: skip
    kept = ["picture.png", "gguf/model.safetensors", "notes.md"]
    for name in old + kept:
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text("old")
    push(folder, "org/model")
    assert hub.commits == 1
    assert not [name for name in old if (there / name).exists()]
    assert all((there / name).read_text() == "old" for name in kept)
    checkpoints.same_bytes(there, folder)
    assert open_checkpoint(there).entries.keys() == open_checkpoint(folder).entries.keys()


def test_the_folder_of_the_shell_has_a_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = renamed_files(Path(), "org/model")
    assert found["README.md"] == b'from_pretrained("org/model")\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("README.md", b"caf\xe9", r"README\.md: cannot be read as UTF-8"),
        ("adapter/adapter_config.json", b"{", r"adapter_config\.json: is not JSON"),
        ("adapter/adapter_config.json", b"[]", "is not a JSON object"),
        ("adapter/adapter_config.json", b"\xff", "is not JSON"),
    ],
)
def test_a_file_that_is_damaged_is_one_error_before_the_upload(hub, folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        push(folder, "org/model")
    assert not hub.created


def test_a_run_that_is_not_finished_stays_here(folder, hub):
    from prunekit.checkpoint.output import OutputFolder

    output = OutputFolder(folder.parent / "other", 1)
    output.begin("same", resume=False, overwrite=False)
    output.close()
    (folder.parent / "other/journal.jsonl").rename(folder / "journal.jsonl")
    with pytest.raises(CheckpointError, match="its run is not finished"):
        push(folder, "org/model")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: is missing"):
        published_files(folder)
    assert hub.commits == 0
    assert not hub.created


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model", "is no name on the hub"),
        ("org/mo del", "output.push: .*Repo id"),
        ("a/b/c", "Repo id"),
    ],
)
def test_a_wrong_name_is_refused(hub, name, message):
    with pytest.raises(ConfigError, match=message):
        check_can_push(name, "output.push")


def test_who_is_not_logged_in_is_told_before_the_run(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match=r"output\.push: the hub cannot be reached or refuses"):
        check_can_push("org/model", "output.push")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="hf auth login"):
        check_can_push("org/model", "output.push")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        check_can_push("org/model", "output.push")


def test_a_hub_that_is_gone_is_one_error(folder, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="org/model: the hub cannot be reached"):
        push(folder, "org/model")
