"""Notes of a plan: windows in which gates do not close, kinds that could be removed."""

import pytest

from prunekit.config.load import load_config
from prunekit.runs.structured.planner import plan
from tests.runs.structured.test_apt import planned

pytest.importorskip("peft")


def test_gates_that_do_not_close_within_a_window_are_remarked(llama, tmp_path):
    notes = " ".join(planned(llama, tmp_path / "a", "").notes)
    assert "apt.decay" not in notes
    assert "apt.kinds: of this family hidden dimensions can be removed too" in notes
    assert "uniform = true makes it one that any tool opens." in notes
    uniform = planned(llama, tmp_path / "c", "uniform = true").notes
    assert "prunekit.load" not in " ".join(uniform)
    notes = " ".join(planned(llama, tmp_path / "b", 'kinds = ["hidden", "heads"]').notes)
    assert "apt.kinds" not in notes


def test_the_gate_that_is_left_is_said(llama, tmp_path):
    planned(llama, tmp_path / "a")
    file = tmp_path / "a.toml"
    file.write_text(file.read_text().replace("decay = 0.5", "decay = 0.2"))
    notes = " ".join(plan(load_config(file)).notes)
    assert "in a window of 2 steps gates fall by 0.4, so that units are removed" in notes
    assert "with a gate of 0.6 still open" in notes
    assert "decay = 0.5 closes them." in notes
