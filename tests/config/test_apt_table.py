"""``[apt]``: its windows, and how it goes with the other tables."""

import pytest

from prunekit.config.apt_table import Apt
from tests.support.configs import GOOD

REST = '[model]\npath = "{model}"\n'
TABLE = "[apt]\nparameters = 0.4\n"


@pytest.fixture
def text():
    """A config with [apt] in place of [prune]."""
    before, _, after = GOOD.partition("[prune]")
    return f"{before}{TABLE}[{after.partition('[')[2]}"


def test_the_budget_falls_along_a_cubic_curve_to_the_end():
    apt = Apt(parameters=0.4, windows=4)
    found = [apt.budget(window) for window in range(5)]
    assert found == pytest.approx([1, 0.4 + 0.6 * 0.75**3, 0.4 + 0.6 / 8, 0.4 + 0.6 / 64, 0.4])
    assert (Apt(parameters=0.4).end, apt.end) == (1200, 600)


def test_it_stands_in_place_of_prune_and_is_dumped_alone(load, text):
    config = load(text)
    assert config.apt == Apt(parameters=0.4)
    assert config.prune.parameters == 0.4
    assert config.prune.parameters_of == "blocks"
    assert (config.prune.method.name, config.prune.method.smoothing) == ("salience", 0.85)
    assert config.training is config.apt
    assert "prune" not in config.dump()
    assert type(config).model_validate(config.dump()).prune == config.prune


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("[train]\n", "train: [apt] trains too. Remove one of both tables."),
        (
            '[prune]\nmethod = "salience"\npattern = "heads"\n',
            "prune: [apt] prunes by itself. Remove one of both tables.",
        ),
        (
            "steps = 100\n",
            "apt: the last window ends at step 1200 (warmup 200 and 10 windows of 100), beyond the "
            "training: steps = 100.",
        ),
        ("rank = 80\n", "apt: rank 80 is above most_rank = 64."),
        ("windows = 0\n", "apt.windows: 0 is not possible: at least 1."),
        ("held_out = 128\n", "leave none to train on."),
        ("[distill]\nend = 3000\n", "distill.end: 3000 is beyond the training"),
    ],
)
def test_contradictions_are_said(mistakes, text, more, message):
    changed = text.replace(TABLE, TABLE + more)
    found = mistakes(changed)
    assert len(found) == 1
    assert message in found[0]
