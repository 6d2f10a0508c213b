"""The presets that ``prunekit init`` writes: complete, and as the defaults are."""

import re
from importlib.resources import files
from pathlib import Path

import pytest

from prunekit.config.load import TABLES, load_config
from prunekit.methods.admm import Admm

STARTER = files("prunekit.cli").joinpath("presets", "starter.toml").read_text("utf-8")


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a config from its text, as a file ``config.toml`` in the current folder."""
    monkeypatch.chdir(tmp_path)

    def load(text, *overrides):
        Path("config.toml").write_text(text, encoding="utf-8")
        return load_config("config.toml", overrides)

    return load


def test_the_starter_is_right_as_it_stands(load):
    config = load(STARTER)
    assert config.prune.method == Admm()
    assert config.evaluate is not None


@pytest.mark.parametrize(
    "key", [key for section in TABLES.values() for key in section.model_fields]
)
def test_the_starter_names_every_key(key):
    assert re.search(rf"^(# )?{key} = ", STARTER, re.MULTILINE)


# Lines of "# key = value" that follow each other, behind the line above them.
COMMENTED = re.compile(r"(.*)\n((?:# \w+ = .+\n)+)")


@pytest.mark.parametrize("found", [*COMMENTED.finditer(STARTER)], ids=lambda found: found[2])
def test_what_the_starter_comments_out_is_the_default_or_an_example(load, found):
    written = re.sub("^# ", "", found[2], flags=re.MULTILINE)
    dump = load(STARTER[: found.start(2)] + written + STARTER[found.end(2) :]).dump()
    assert (dump == load(STARTER).dump()) != found[1].endswith("for example:")
