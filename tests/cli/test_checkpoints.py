"""Commands that write a checkpoint elsewhere."""

import pytest
from huggingface_hub import constants

from prunekit.cli.main import main
from tests.support import checkpoints
from tests.support.hub_server import TOKEN, hub_server


def test_push_prints_the_address(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = checkpoints.write(tmp_path / "m")
    with hub_server(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        assert main(["push", str(folder), "org/model"]) == 0
        assert capsys.readouterr().out == f"{hub.url}/org/model/commit/1\n"
        checkpoints.same_bytes(hub.folder / "org/model", folder)


@pytest.mark.parametrize("folder", ["absent", "."])
def test_push_refuses_what_is_no_checkpoint(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["push", folder, "org/model"]) == 2
    assert "config.json: is missing" in capsys.readouterr().err
