"""Facts that ranks compare, so that a difference between them is found before a run."""

import json

import pytest
import torch

from prunekit.config.run_config import SweepConfig
from prunekit.distributed.agreement import find_differences, flatten
from prunekit.runs.rank_facts import config_facts, plan_facts, versions
from tests.support import checkpoints
from tests.support.checkpoints import planned


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama"))


def differing(one, other):
    """Return the dotted names of the facts that differ between two ranks."""
    every = [dict(flatten(facts)) for facts in (one, other)]
    return [line.partition(": ")[0] for line in find_differences(every, ["0", "1"])]


def test_equal_plans_have_equal_facts_that_are_json(llama, tmp_path):
    one, other = (planned(llama, tmp_path / "out") for _ in range(2))
    assert plan_facts(one) == plan_facts(other)
    assert config_facts(one.config) == config_facts(other.config)
    json.dumps([*flatten(plan_facts(one)), *flatten(config_facts(one.config))])


def test_a_setting_is_named_by_its_key(llama, tmp_path):
    one = planned(llama, tmp_path / "out")
    other = planned(llama, tmp_path / "out", calibration={"seed": 1})
    assert differing(config_facts(one.config), config_facts(other.config)) == ["calibration.seed"]


def test_the_kind_of_job_and_the_versions_are_compared(llama, tmp_path, monkeypatch):
    config = planned(llama, tmp_path / "out").config
    before = config_facts(config)
    assert before["job"] == "Config"
    assert config_facts(SweepConfig(None, {}, {}, "")) == {
        "job": "SweepConfig",
        "versions": versions(),
    }
    monkeypatch.setattr(
        "prunekit.reports.environment.installed", lambda: {"torch": "0", "triton": "0"}
    )
    assert "versions.torch" in differing(before, config_facts(config))


def test_the_release_of_python_that_only_mends_faults_is_left_out(monkeypatch):
    monkeypatch.setattr("platform.python_version_tuple", lambda: ("3", "11", "99"))
    assert versions()["python"] == "3.11"


def test_a_tensor_of_another_type_differs_by_its_file(llama, tmp_path):
    bfloat16 = checkpoints.write(tmp_path / "m", dtype=torch.bfloat16)
    one, other = planned(llama, tmp_path / "out"), planned(bfloat16, tmp_path / "out")
    names = differing(plan_facts(one), plan_facts(other))
    assert "tensors.model.safetensors" in names
    assert "device" not in names
