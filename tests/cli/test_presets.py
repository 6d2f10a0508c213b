"""The presets that ``prunekit init`` writes: complete, and as the defaults are."""

import re
from importlib.resources import files

import pytest

from prunekit.config.load import TABLES
from prunekit.methods.admm import Admm

STARTER = files("prunekit.cli").joinpath("presets", "starter.toml").read_text("utf-8")


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
COMMENTED = re.compile(r"(.*)\n((?:# (?:\w+ = .+|\[\w+\])\n)+)")


@pytest.mark.parametrize("found", [*COMMENTED.finditer(STARTER)], ids=lambda found: found[2])
def test_what_the_starter_comments_out_is_the_default_or_an_example(load, found):
    written = re.sub("^# ", "", found[2], flags=re.MULTILINE)
    needed = "[train]\nheld_out = 4\n" if "end = " in written else ""
    dump = load(STARTER[: found.start(2)] + written + STARTER[found.end(2) :] + needed).dump()
    assert (dump == load(STARTER).dump()) != found[1].lower().endswith("example:")
