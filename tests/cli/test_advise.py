"""The command ``advise``: on a config, and for a model."""

import json
from pathlib import Path

import pytest

from prunekit.cli.main import main
from prunekit.config.load import load_config
from tests.support import checkpoints

CONFIG = """\
# Mine.
[model]
path = "m"
[prune]
method = "magnitude"
sparsity = 0.7
[output]
path = "out"
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints.write(Path("m"))
    Path("c.toml").write_text(CONFIG)


def test_advice_on_a_config_is_followed_in_a_new_one(here, capsys):
    assert main(["advise", "c.toml", "--write", "new.toml"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("method  prune.method: at 70% sparsity stories15M")
    assert '    prune.method = "admm"\n' in said
    written = Path("new.toml").read_text()
    assert written.startswith("# Mine.\n")
    assert load_config("new.toml").prune.method.name == "admm"
    assert main(["advise", "new.toml", "--json"]) == 0
    assert {each["rule"] for each in json.loads(capsys.readouterr().out)} <= {"samples"}
    assert main(["advise", "c.toml", "--write", "new.toml"]) == 2
    assert "new.toml: exists already" in capsys.readouterr().err


@pytest.mark.parametrize(("goal", "stored"), [("speed", "2:4"), ("memory", "bitmask")])
def test_a_model_gets_a_config_for_a_goal(here, capsys, goal, stored):
    assert main(["advise", "m", "--goal", goal, "--write", f"{goal}.toml"]) == 0
    made = load_config(f"{goal}.toml")
    assert (made.output.format, made.calibration.data) == (stored, ["self"])
    assert f"{goal}.toml: written" in capsys.readouterr().out
    assert main(["advise", f"{goal}.toml", "--goal", goal]) == 0
    assert capsys.readouterr().out == "Nothing to advise.\n"
