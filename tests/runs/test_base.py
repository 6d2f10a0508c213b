"""Texts, timing, fingerprint and evaluation of all runs."""

import json
import time

import pytest
import torch

from prunekit.distributed.ranks import Ranks
from prunekit.errors import ConfigError
from prunekit.runs.base import OWN_TEXT, RunBase
from prunekit.runs.record import Record
from tests.support import checkpoints
from tests.support.checkpoints import planned


class Run(RunBase):
    """A run without records."""

    def records(self, *, resume, overwrite):
        return iter(())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model"))


def test_seconds_of_a_phase_add_up(folder, tmp_path):
    run = Run(planned(folder, tmp_path / "out"), 1)
    for _ in range(2):
        before = run.seconds["prune"]
        with run._timed("prune"):
            pass
        assert run.seconds["prune"] > before
    assert run.seconds["write"] == 0.0


def test_seconds_of_records_are_those_until_each_and_not_of_their_reader(folder, tmp_path):
    run = Run(planned(folder, tmp_path / "out"), 1)
    closed = []

    def work():
        try:
            for name in ("a", "b"):
                time.sleep(0.01)
                yield Record("step", name)
            return 3
        finally:
            closed.append(True)

    def consume():
        return (yield from run._timed_records("prune", work()))

    records, names, result = consume(), [], None
    try:
        while True:
            names.append(next(records).name)
            time.sleep(0.2)
    except StopIteration as end:
        result = end.value
    assert (names, result, closed) == (["a", "b"], 3, [True])
    assert 0.02 <= run.seconds["prune"] < 0.2
    stopped = run._timed_records("prune", work())
    next(stopped)
    stopped.close()
    assert closed == [True, True]


def test_more_ranks_than_samples_are_refused(folder, tmp_path):
    (tmp_path / "short.txt").write_text("one short text")
    data = {"data": str(tmp_path / "short.txt"), "samples": 4, "length": 12}
    plan = planned(folder, tmp_path / "out", calibration=data)
    with pytest.raises(ConfigError, match="text for 3 samples, which 4 processes cannot share"):
        Run(plan, 1, Ranks(0, 4))._texts()


def test_generated_text_is_written_once_and_read_again(folder, tmp_path):
    run = Run(planned(folder, tmp_path / "out", calibration={"data": "self"}), 1)
    first, _ = run._begin(resume=False, overwrite=False)
    file = run.output.folder / OWN_TEXT
    assert json.loads(file.read_text()) == first.ids.tolist()
    file.write_text(json.dumps([[5, 6, 7]]))
    assert run._own_text().ids.tolist() == [[5, 6, 7]]
    run.output.close()


def test_generated_text_that_was_changed_is_generated_again(folder, tmp_path):
    plan = planned(folder, tmp_path / "out", calibration={"data": "self"})
    first, again = Run(plan, 1), Run(plan, 1)
    tokens, _ = first._begin(resume=False, overwrite=False)
    first.output.close()
    (first.output.folder / OWN_TEXT).write_text(json.dumps([[5, 6, 7]]))
    assert torch.equal(again._begin(resume=True, overwrite=False)[0].ids, tokens.ids)
    again.output.close()


def test_evaluations_come_from_the_journal_when_it_has_them(folder, tmp_path, monkeypatch):
    judged = {"data": str(folder / "text.txt"), "length": 12, "windows": 2}
    run = Run(planned(folder, tmp_path / "out", evaluate=judged), 1)
    tokens, texts = run._begin(resume=False, overwrite=False)
    first = [*run._evaluate("before", texts)]
    monkeypatch.setattr(run, "_evaluator", lambda which: pytest.fail("measured again"))
    assert [*run._evaluate("before", texts)] == first
    assert [record.kind for record in first] == ["phase", "evaluation"]
    assert tokens is not None
    run.output.close()
