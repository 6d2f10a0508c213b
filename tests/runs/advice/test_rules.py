"""Each rule speaks where it is broken, and its own change silences it."""

import tomllib

import pytest

from prunekit.config.load import load_config_text
from prunekit.config.toml_edit import with_changes
from prunekit.runs.advice.base import Subject
from prunekit.runs.advice.rules import IN_PLANS, RULES, advise, remarks

WEIGHTS = """\
[model]
path = "a/b"
[calibration]
data = "self"
samples = 128
length = 64
[prune]
method = "admm"
pattern = "unstructured"
sparsity = 0.5
[evaluate]
data = "pydoc:test"
[output]
path = "out"
"""
UNITS = """\
[model]
path = "a/b"
[calibration]
data = "self"
[prune]
method = "hybrid"
pattern = ["heads", "neurons"]
sparsity = 0.25
uniform = true
round_to = 64
[evaluate]
data = "pydoc:test"
[output]
path = "out"
"""
HALF_BY_MAGNITUDE = {"prune.method": "magnitude", "prune.sparsity": 0.7}
BROKEN = {
    "prunes-nothing": (WEIGHTS, {"prune.sparsity": 1e-5}, None),
    "method": (WEIGHTS, HALF_BY_MAGNITUDE, None),
    "trained-method": (WEIGHTS, HALF_BY_MAGNITUDE | {"train.steps": 100}, None),
    "early-end": (WEIGHTS, {"prune.sparsity": 0.7, "train.steps": 100, "prune.end": 5}, None),
    "schedule": (WEIGHTS, HALF_BY_MAGNITUDE | {"train.steps": 5000}, None),
    "serving-pattern": (WEIGHTS, {"prune.allocation": "owl", "output.format": "bitmask"}, "speed"),
    "storage": (WEIGHTS, {}, "memory"),
    "samples": (WEIGHTS, {"calibration.samples": 1}, None),
    "text": (WEIGHTS, {"calibration.data": ["pydoc:train"]}, None),
    "evaluate": (WEIGHTS, {"evaluate.data": None}, None),
    "widths": (UNITS, {"prune.round_to": None}, "speed"),
    "uniform": (UNITS, {"prune.uniform": None}, "speed"),
    "entropy": (UNITS, {"prune.method": "entropy", "prune.pattern": ["heads"]}, None),
}
FOLLOWED_BY_HAND = {"prunes-nothing"}


def advice(text, folder, goal):
    config = load_config_text(text, folder)
    shapes = () if "round_to" in text or "hybrid" in text else [(64, 128), (128, 256)]
    return {each.rule: each for each in advise(Subject(config, goal, shapes))}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_speaks_where_it_is_broken_and_is_silent_once_followed(rule, tmp_path):
    text, change, goal = BROKEN[rule]
    broken = with_changes(text, change)
    if rule == "evaluate":
        broken = broken.replace("[evaluate]\n", "")
    found = advice(broken, tmp_path, goal)
    assert list(found) == [rule]
    assert found[rule].key in str(found[rule])
    assert bool(found[rule].change) == (rule not in FOLLOWED_BY_HAND)
    followed = with_changes(broken, found[rule].change or {"prune.sparsity": 0.3})
    tomllib.loads(followed)
    assert rule not in advice(followed, tmp_path, goal)


@pytest.mark.parametrize(
    ("text", "goal"), [(WEIGHTS, None), (WEIGHTS, "quality"), (UNITS, "speed")]
)
def test_a_config_that_follows_all_rules_hears_nothing(text, goal, tmp_path):
    assert advice(text, tmp_path, goal) == {}


def test_a_sparsity_of_zero_is_remarked_of_units_too(tmp_path):
    units = load_config_text(with_changes(UNITS, {"prune.sparsity": 0.0}), tmp_path)
    assert remarks(Subject(units)) == ("prune.sparsity: 0 prunes nothing: no unit is removed.",)


def test_plans_note_what_was_measured_and_what_does_nothing():
    assert set(IN_PLANS) == {"prunes-nothing", "method", "trained-method", "early-end"}
