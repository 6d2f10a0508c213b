"""``[gates]``: limits, and those that a run would not measure."""

from tests.support.configs import GOOD, prune

EVALUATED = '[evaluate]\ndata = "pydoc:test"\n'


def test_limits_are_those_that_are_set(load):
    found = load(f"{GOOD}[gates]\nsparsity_gap = 0.001\nlayer_error = 0.5\n").gates
    assert found.limits == {"sparsity_gap": 0.001, "layer_error": 0.5}
    assert found.on_fail == "fail"
    assert load(GOOD).gates is None


def test_a_limit_that_is_not_measured_is_refused(mistakes):
    text = f"{GOOD}[gates]\nperplexity_increase = 0.1\naccuracy_drop = 0.1\n"
    assert [line.partition(": ")[2] for line in mistakes(text)] == [
        "gates.perplexity_increase: is measured on the data of [evaluate], and there is no such "
        "table.",
        "gates.accuracy_drop: is measured on the data of [evaluate], and there is no such table.",
    ]
    (line,) = mistakes(f"{GOOD}{EVALUATED}[gates]\naccuracy_drop = 0.1\n")
    assert line.endswith(
        "gates.accuracy_drop: without evaluate.task or tasks perplexity is measured."
    )
    unmeasured = prune('method = "wanda"\npattern = "2:4"\nmeasure_error = false\n')
    (line,) = mistakes(f"{unmeasured}[gates]\nlayer_error = 0.1\n")
    assert line.endswith("needs [calibration] and measure_error, which measure it.")


def test_units_have_no_error_of_a_layer(mistakes):
    text = prune('method = "obs"\npattern = "heads"\nsparsity = 0.5\n')
    (line,) = mistakes(f"{text}[gates]\nlayer_error = 0.1\nsparsity_gap = 0.1\n")
    assert line.endswith("units are removed: what is left has no error of a layer.")


def test_limits_have_bounds_and_names(mistakes):
    (line,) = mistakes(f"{GOOD}[gates]\nsparsity_gap = -1.0\n")
    assert line.endswith("gates.sparsity_gap: -1.0 is not possible: at least 0.")
    (line,) = mistakes(f"{GOOD}[gates]\nsparsity_gab = 0.1\n")
    assert line.endswith('gates.sparsity_gab: no such key. Did you mean "sparsity_gap"?')


def test_a_sweep_takes_no_limits(mistakes):
    text = prune('pattern = "2:4"\n') + f"{EVALUATED}[gates]\nsparsity_gap = 0.1\n"
    (line,) = mistakes(text + '[sweep]\nmethod = ["wanda", "ria"]\n')
    assert line.endswith(
        "a sweep compares runs, whatever they reach. Remove this table or [sweep]."
    )
