"""Keys of ``[prune]`` that prune while training: what goes together, and what does not."""

import pytest

from prunekit.allocations.schedules import PruneSchedule
from prunekit.config.structured_table import StructuredPrune
from tests.support.configs import prune

TEXT = '[calibration]\ndata = "pydoc:train"\n'
WEIGHTS = 'method = "magnitude"\npattern = "unstructured"\nsparsity = 0.7\n'
UNITS = 'method = "gradient"\npattern = "heads"\nsparsity = 0.5\n'


def training(lines, train="[train]\nsteps = 100\n"):
    return prune(lines, rest=f"{TEXT}{train}")


@pytest.mark.parametrize("table", [WEIGHTS, UNITS])
def test_the_schedule_is_that_of_the_keys(load, table):
    sparsity = load(training(table)).prune.sparsity
    assert load(training(table)).prune.gradual is None
    lines = f"{table}end = 80\nstart = 10\nevery = 20\ninitial_sparsity = 0.1\nregrow = 0.2\n"
    found = load(training(f'{lines}schedule = "linear"')).prune
    assert found.gradual == PruneSchedule("linear", sparsity, 80, 10, 20, 0.1)
    assert found.regrowth_interval == 20
    found = load(training(f"{table}end = 80")).prune
    assert found.gradual == PruneSchedule("cubic", sparsity, 80)
    assert found.regrowth_interval is None
    assert load(training(f"{lines}regrow_every = 7")).prune.regrowth_interval == 7


def test_a_pattern_of_one_sparsity_is_reached_at_once(load, mistakes):
    two_four = 'method = "wanda"\npattern = "2:4"\n'
    assert load(training(f"{two_four}end = 80")).prune.gradual == PruneSchedule("one-shot", 0.5, 80)
    wrong = f'{two_four}end = 80\nstart = 1\nevery = 2\nregrow = 0.1\nschedule = "cubic"'
    once = '"2:4" fixes the sparsity: it is pruned once, at end.'
    assert mistakes(training(wrong)) == [
        f"config.toml:5: prune.start: {once}",
        f"config.toml:6: prune.every: {once}",
        f"config.toml:7: prune.regrow: {once}",
        'config.toml:8: prune.schedule: "2:4" fixes the sparsity: only schedule "one-shot" is '
        "possible, from 0.",
    ]


@pytest.mark.parametrize("table", [WEIGHTS, UNITS])
def test_keys_of_the_schedule_need_its_end(mistakes, table):
    lines = f"{table}start = 1\nevery = 2\nregrow = 0.1\nregrow_every = 3\n"
    lines += 'schedule = "linear"\ninitial_sparsity = 0.1'
    needed, neither = "applies only with end, to prune while training.", "applies only with 2 steps"
    said = mistakes(training(lines))
    assert [line.partition(": ")[2] for line in said[:3]] == [
        f"prune.start: {needed}", f"prune.every: {needed}", f"prune.regrow: {needed}",
    ]  # fmt: skip
    assert [neither in line for line in said[3:]] == [True, True]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("end = 10\nstart = 11", "6: prune.start: 11 is after end = 10."),
        ("end = 10\nevery = 0", "6: prune.every: 0 is not possible: at least 1."),
        ("end = -1", "5: prune.end: -1 is not possible: at least 0."),
        ("end = 10\nregrow = 1.0", "6: prune.regrow: 1.0 is not possible: less than 1."),
        ("end = 10\nregrow_every = 2", "6: prune.regrow_every: applies only with regrow."),
        (
            "end = 10\ninitial_sparsity = 0.8",
            "6: prune.initial_sparsity: 0.8 is above the final sparsity.",
        ),
        (
            "steps = 4\nend = 10",
            "6: prune.end: steps = 4 reaches the sparsity before training, end while training; "
            "remove one of both.",
        ),
        (
            'end = 10\nrecover = "block"',
            "6: prune.recover: end prunes while training, and training recovers; remove this key.",
        ),
        (
            "end = 10\nmeasure_error = true",
            "6: prune.measure_error: end prunes while training, and a layer has no single error "
            "then; remove this key.",
        ),
        (
            'end = 10\nevery = 2\nschedule = "one-shot"',
            '7: prune.schedule: "one-shot" prunes once, at end; remove the key every.',
        ),
        ("end = 101", "5: prune.end: 101 is beyond the training: train.steps = 100."),
    ],
)
def test_contradictions_are_named_with_their_line(mistakes, lines, expected):
    assert mistakes(training(f"{WEIGHTS}{lines}")) == [f"config.toml:{expected}"]


@pytest.mark.parametrize("key", ['compensate = "refit"', "truth = true", 'steps = "each"'])
def test_units_pruned_while_training_are_not_compensated_or_ranked_once(mistakes, key):
    (line,) = mistakes(training(f"{UNITS}{key}\nend = 10"))
    assert "end while training" in line or "end prunes while training" in line


def test_units_pruned_while_training_have_no_compensation(load):
    obs = 'method = "obs"\npattern = "heads"\nsparsity = 0.5\n'
    assert load(training(obs)).prune.compensate == "refit"
    assert load(training(f"{obs}end = 10")).prune.compensate == "none"


def test_without_a_training_there_are_no_steps_to_count(mistakes):
    (line,) = mistakes(training(f"{WEIGHTS}end = 10", train=""))
    assert line == (
        "config.toml:5: prune.end: counts the steps of [train], and there is no such table."
    )


@pytest.mark.parametrize("table", [WEIGHTS, UNITS])
def test_a_dump_says_the_same_when_it_is_read_again(load, table):
    for lines in ("", "end = 50", "end = 50\nevery = 5\nregrow = 0.1\nregrow_every = 3"):
        config = load(training(f"{table}{lines}"))
        dump = config.dump()
        assert ("schedule" in dump["prune"]) == ("end" in lines)
        again = type(config).model_validate(dump, strict=True)
        assert again.dump() == dump
        assert again.prune.gradual == config.prune.gradual


def test_a_sparsity_in_several_steps_has_a_start_for_units_too():
    values = {"method": "random", "pattern": "heads", "sparsity": 0.5, "steps": 3}
    assert StructuredPrune.model_validate(values | {"initial_sparsity": 0.25}).steps == 3
