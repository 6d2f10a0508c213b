"""Keys are changed in the text of a config, and its comments stay."""

import pytest

from prunekit.config.toml_edit import with_changes
from prunekit.errors import ConfigError

TEXT = """\
# Why.
[prune]  # what goes
method = "wanda"  # for now
skip = [
  "a",  # one
  "b",
]
[output]
path = "x"
"""


def test_values_are_replaced_added_and_removed():
    changed = with_changes(
        TEXT,
        {
            "prune.method": "admm",
            "prune.skip": None,
            "prune.steps": None,
            "prune.end": 3,
            "evaluate.data": ["a.txt"],
        },
    )
    assert changed == (
        '# Why.\n[prune]  # what goes\nend = 3\nmethod = "admm"\n[output]\npath = "x"\n\n'
        '[evaluate]\ndata = ["a.txt"]\n'
    )


@pytest.mark.parametrize("text", ["prune = {end = 1}\n", "prune.end = 1\n"])
def test_a_text_that_says_it_otherwise_is_refused_with_the_keys(text):
    with pytest.raises(ConfigError, match=r"Set:\n  prune.end = 2$"):
        with_changes(text, {"prune.end": 2})
