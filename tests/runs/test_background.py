"""One job at a time: results are collected, errors are raised once."""

import time
from threading import Event, Timer, current_thread

import pytest

from prunekit.runs import background as running
from prunekit.runs.background import Background


def until_done(background):
    end = time.monotonic() + 10
    while not background._job.done():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def background():
    return Background("prunekit-test")


def test_the_caller_goes_on_while_a_job_is_done(background):
    go = Event()
    background.start(lambda: go.wait(10) and current_thread().name)
    assert background.is_busy
    assert background.peek() is None
    go.set()
    assert background.result().startswith("prunekit-test")
    assert not background.is_busy
    assert background.peek() is None


def test_a_result_stays_until_it_is_collected(background):
    background.start(lambda: 5)
    until_done(background)
    assert background.peek() == background.peek() == 5
    assert background.result() == 5


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("how", ["peek", "result"])
def test_the_error_of_a_job_is_raised_once(background, error, how):

    def fail():
        raise error

    background.start(fail)
    until_done(background)
    with pytest.raises(error):
        getattr(background, how)()
    assert not background.is_busy
    background.start(lambda: 5)
    assert background.result() == 5


def test_closing_waits_for_the_job(background):
    go, happened = Event(), []
    background.start(lambda: go.wait(10) and happened.append("job"))
    Timer(0.1, go.set).start()
    background.close(lambda: happened.append("closed"))
    assert happened == ["job", "closed"]
    background.close(lambda: happened.append("again"))
    assert happened[2:] == ["again"]


def test_closing_waits_for_a_job_that_fails(background):
    happened = []
    background.start(lambda: 1 / 0)
    background.close(lambda: happened.append("closed"))
    assert happened == ["closed"]


def test_an_interrupted_process_does_not_wait_for_long(background, monkeypatch):
    """What is closed stays open for the job as long as it lasts."""
    monkeypatch.setattr(running, "PATIENCE", 0.01)
    go, happened, closed = Event(), [], Event()

    def close():
        happened.append("closed")
        closed.set()

    background.start(lambda: go.wait(10) and happened.append("job"))
    try:
        raise KeyboardInterrupt  # noqa: TRY301
    except KeyboardInterrupt:
        background.close(close)
    assert not happened
    go.set()
    assert closed.wait(10)
    assert happened == ["job", "closed"]


def test_an_interrupted_wait_for_the_result_leaves_the_job_to_close(background, monkeypatch):
    go, happened = Event(), []
    background.start(lambda: go.wait(10) and happened.append("job"))

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(background._job, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        background.result()
    assert background.is_busy
    Timer(0.1, go.set).start()
    background.close(lambda: happened.append("closed"))
    assert happened == ["job", "closed"]


def test_an_interrupted_close_closes_after_the_job(background, monkeypatch):
    go, happened, closed = Event(), [], Event()

    def close():
        happened.append("closed")
        closed.set()

    def interrupted(*_):
        raise KeyboardInterrupt

    background.start(lambda: go.wait(10) and happened.append("job"))
    monkeypatch.setattr(running, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        background.close(close)
    assert not happened
    go.set()
    assert closed.wait(10)
    assert happened == ["job", "closed"]


def test_a_caller_that_wants_no_more_does_not_wait_for_long(background, monkeypatch):
    monkeypatch.setattr(running, "PATIENCE", 0.01)
    go, happened, closed = Event(), [], Event()

    def records():
        try:
            yield 1
        finally:
            background.close(closed.set)

    background.start(lambda: go.wait(10) and happened.append("job"))
    generator = records()
    next(generator)
    generator.close()
    assert not closed.is_set()
    go.set()
    assert closed.wait(10)
    assert happened == ["job"]


def test_a_thread_that_cannot_start_is_an_error_and_no_job(background, monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(running.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        background.start(lambda: 5)
    assert not background.is_busy
    background.close(lambda: None)
