"""The presets that ``prunekit init`` writes: complete, and as the defaults are."""

import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from prunekit.config.apt_table import Apt
from prunekit.config.load import TABLES
from prunekit.methods.admm import Admm

PRESETS = files("prunekit.cli").joinpath("presets")
STARTER = PRESETS.joinpath("starter.toml").read_text("utf-8")
APT = PRESETS.joinpath("apt.toml").read_text("utf-8")


def test_the_starter_is_right_as_it_stands(load):
    config = load(STARTER)
    assert config.prune.method == Admm()
    assert config.evaluate is not None


@pytest.mark.parametrize(
    ("table", "key"), [(name, key) for name in TABLES for key in TABLES[name].model_fields]
)
def test_the_starter_names_every_key_and_that_of_apt_its_own(table, key):
    assert re.search(rf"^(# )?{key} = ", APT if table == "apt" else STARTER, re.MULTILINE)


def test_the_preset_of_apt_is_right_and_shows_the_defaults(load):
    config = load(APT)
    assert config.apt is not None
    shown = dict(re.findall(r"^# (\w+) = (.+)$", APT.partition("[apt]")[2], re.MULTILINE))
    examples = {"targets", "also", "save_every", "sharded"}
    for key, value in shown.items():
        if key not in examples:
            assert tomllib.loads(f"x = {value}")["x"] == Apt.model_fields[key].default, key
    lines = "".join(f"{key} = {shown[key]}\n" for key in examples)
    assert load(APT.replace("[apt]\n", f"[apt]\n{lines}")).apt != config.apt


# Lines of "# key = value" that follow each other, behind the line above them.
COMMENTED = re.compile(r"(.*)\n((?:# (?:\w+ = .+|\[\w+\])\n)+)")


@pytest.mark.parametrize("found", [*COMMENTED.finditer(STARTER)], ids=lambda found: found[2])
def test_what_the_starter_comments_out_is_the_default_or_an_example(load, found):
    written = re.sub("^# ", "", found[2], flags=re.MULTILINE)
    needed = "[train]\nheld_out = 4\n" if "end = " in written else ""
    before = STARTER[: found.start(2)]
    if "task = " in written:
        Path("train.tsv").write_text("review\tgold\n")
        before = before.replace('data = ["pydoc:train"]', 'data = "train.tsv"')
    if "accuracy_drop = " in written:
        Path("test.tsv").write_text("text\tlabel\n")
        rows = 'task = "classification"\ndata = "test.tsv"'
        before = before.replace('data = ["pydoc:test"]', rows).replace("windows = 12\n", "")
    dump = load(before + written + STARTER[found.end(2) :] + needed).dump()
    assert (dump == load(STARTER).dump()) != found[1].lower().endswith("example:")
