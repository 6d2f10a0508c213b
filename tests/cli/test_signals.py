"""The three signals that ask a command to stop."""

import os
import signal

import pytest

from prunekit.cli.signals import SIGNALS, StopSignals


@pytest.fixture(autouse=True)
def _default_handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_stops_a_command_at_once(number):
    signals = StopSignals()
    with pytest.raises(KeyboardInterrupt), signals:
        os.kill(os.getpid(), number)
    assert signals.exit_code == 128 + number


@pytest.mark.parametrize("number", SIGNALS)
def test_while_patient_the_first_of_each_is_only_noted(number, capfd):
    with StopSignals() as signals:
        signals.patient = True
        assert not signals.requested()
        for each in (number, *set(SIGNALS) - {number}):
            os.kill(os.getpid(), each)
        assert signals.requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signals.exit_code == 128 + number
    assert capfd.readouterr().err.count("again stops at once") == 3


def test_handlers_are_restored_and_contexts_can_be_nested():
    with StopSignals() as outer:
        with StopSignals() as inner:
            inner.patient = True
            os.kill(os.getpid(), signal.SIGTERM)
        assert (inner.received, outer.received) == ([signal.SIGTERM], [])
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert {signal.getsignal(number) for number in SIGNALS} == {signal.default_int_handler}


def test_a_signal_that_is_ignored_stays_so():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
    assert signals.received == []


def test_without_a_signal_the_code_is_that_of_ctrl_c():
    assert StopSignals().exit_code == 130
