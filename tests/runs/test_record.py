"""Streams of records, and stopping them."""

import pytest

from prunekit.errors import StoppedError
from prunekit.runs.record import Record, stoppable

RECORDS = [Record("start", ""), Record("step", "one"), Record("finish", "folder")]


def test_all_records_pass_while_nobody_stops():
    assert [*stoppable(iter(RECORDS), lambda: False)] == RECORDS


def test_a_stop_takes_effect_after_the_record_before_it():
    answers = iter([False, True])
    records = stoppable(iter(RECORDS), lambda: next(answers))
    assert [next(records), next(records)] == RECORDS[:2]
    with pytest.raises(StoppedError, match="Stopped as asked"):
        next(records)


def test_a_finished_run_is_not_stopped():
    assert [*stoppable(iter(RECORDS[2:]), lambda: True)] == RECORDS[2:]


def test_records_do_not_share_values():
    Record("a", "").values["x"] = 1
    assert Record("a", "").values == {}
