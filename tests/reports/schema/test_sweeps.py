"""Reports of sweeps, whose runs have to be alike."""

import pytest
from pydantic import ValidationError

from prunekit.reports.schema.sweeps import Agreement, SweepReport

MEASURED = {
    "evaluation": [{"data": "a.txt", "metric": "perplexity", "value": "inf", "protocol": ""}],
    "bytes": 10,
    "peak_rss_bytes": 20,
    "peak_device_bytes": 0,
}
SPEED = {"prefill": 1.0, "decode": 2.0, "lexical_diversity": 0.5, "repetition": 0.0}
RUN = {
    "name": "wanda",
    "series": "wanda",
    "sparsity": 0.5,
    "achieved": 0.5,
    "parameters": 5,
    "active": {"heads": 1},
    "whole": {"heads": 2},
    "seconds": 1.5,
}


def report(dense, *runs):
    values = {"prunekit": "1", "model": {}, "kind": "sweep"}
    return SweepReport.model_validate(values | {"dense": dense, "runs": [*runs]})


def test_models_that_are_measured_alike_are_accepted():
    assert report(MEASURED, MEASURED | RUN).runs[0].shape == (1, False, 0)
    assert report(MEASURED | SPEED, MEASURED | RUN | SPEED).dense.shape == (1, True, 0)


@pytest.mark.parametrize(
    "change",
    [SPEED, {"evaluation": 2 * MEASURED["evaluation"]}, {"texts": [["prompt", "text"]]}],
    ids=["speed", "texts", "samples"],
)
def test_a_run_that_is_measured_otherwise_is_named(change):
    with pytest.raises(ValidationError, match="wanda was not measured like the dense model"):
        report(MEASURED, MEASURED | RUN | change)


@pytest.mark.parametrize("missing", SPEED)
def test_speed_is_measured_whole(missing):
    speed = {key: value for key, value in SPEED.items() if key != missing}
    with pytest.raises(ValidationError, match=r"some of prefill, decode, .* are missing"):
        report(MEASURED | speed, MEASURED | RUN | SPEED)


def test_units_are_counted_before_and_after():
    run = MEASURED | RUN | {"whole": {"neurons": 2}}
    with pytest.raises(ValidationError, match="wanda: active and whole name other kinds"):
        report(MEASURED, run)


def test_a_sweep_has_a_run():
    with pytest.raises(ValidationError, match="runs"):
        report(MEASURED)


def test_agreement_compares_all_pairs_of_rankers():
    values = {"kind": "heads", "rankers": ["magnitude", "obs"], "spearman": [[1.0, None], [0.5, 1]]}
    assert Agreement.model_validate(values).spearman[0][1] is None
    with pytest.raises(ValidationError, match="a row and a column for each ranker"):
        Agreement.model_validate(values | {"spearman": [[1.0]]})
