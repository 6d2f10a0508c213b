"""Uploads to a stand-in of the hub."""

import json

import pytest
from huggingface_hub import constants

from prunekit.checkpoint import adapter
from prunekit.checkpoint.push import check_can_push, published_files, push
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
    """A finished folder with all that a run may leave."""
    made = checkpoints.write(tmp_path / "pruned")
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
