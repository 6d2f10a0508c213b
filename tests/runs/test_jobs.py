"""Dispatch of jobs to plans and time estimates."""

import shutil
from dataclasses import replace

import pytest
from huggingface_hub import constants

from prunekit.config.load import load_config
from prunekit.distributed.ranks import Ranks
from prunekit.errors import CapacityError, ConfigError, GateError, HubError
from prunekit.models.devices import resolve_device
from prunekit.runs import jobs
from prunekit.runs.sparsify.plan import Plan
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.sweep.plan import SweepPlan
from tests.support import checkpoints
from tests.support.checkpoints import planned
from tests.support.hub_server import TOKEN, hub_server
from tests.support.structured import BOTH, write_config
from tests.support.sweeps import write_sweep


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("model"))


def test_a_run_elsewhere_is_told_at_the_speed_of_what_is_here(folder, tmp_path):
    plan = planned(folder, tmp_path / "out")
    plan = replace(plan, preflight=jobs.Preflight(80 * 10**9), device="a GPU that is not here")
    told = jobs.estimate(plan)
    assert told is not None
    assert told.startswith(f"at the speed of {resolve_device('auto')} here")
    assert "a block" in told


def test_each_config_has_its_kind_of_plan(folder, tmp_path):
    output = tmp_path / "out"
    zeros = planned(folder, output).config
    units = load_config(write_config(folder, output, BOTH))
    sweep = load_config(write_sweep(folder, output, "sparsity = [0.25, 0.5]", 'method = "obs"'))
    kinds = [type(jobs.plan(config)) for config in (zeros, units, sweep)]
    assert kinds == [Plan, StructuredPlan, SweepPlan]


def test_runs_have_a_time_estimate_but_trainings_and_sweeps(folder, tmp_path):
    path = write_config(folder, tmp_path / "out", BOTH)
    assert "a block, files apart: forward" in (jobs.estimate(jobs.plan(load_config(path))) or "")
    path.write_text(path.read_text() + "[train]\nheld_out = 2\n")
    assert jobs.estimate(jobs.plan(load_config(path))) is None
    sweep = write_sweep(folder, tmp_path / "out", "sparsity = [0.25, 0.5]", 'method = "obs"')
    assert jobs.estimate(jobs.plan(load_config(sweep))) is None


def test_a_sweep_is_refused_on_several_ranks(folder, tmp_path):
    path = write_sweep(folder, tmp_path / "out", "sparsity = [0.25, 0.5]", 'method = "obs"')
    with pytest.raises(ConfigError, match="one process each"):
        jobs.plan(load_config(path), Ranks(0, 2))


def test_units_are_planned_for_another_device_too(folder, tmp_path):
    (tmp_path / "outline").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "outline")
    config = load_config(write_config(tmp_path / "outline", tmp_path / "out", BOTH, text=folder))
    made = jobs.plan(config, Ranks(0, 2), jobs.Preflight(80 * 10**9))
    assert (made.device.type, made.where) == ("cuda", "device")
    assert (jobs.estimate(made) or "").startswith("at the speed of")
    with pytest.raises(CapacityError, match="1 kB are free"):
        jobs.plan(config, preflight=jobs.Preflight(1000))


def test_other_objects_than_configs_and_plans_are_refused():
    for other in ("config.toml", None, {}):
        with pytest.raises(ConfigError, match="is no config"):
            jobs.plan(other)
        with pytest.raises(ConfigError, match="is no plan"):
            next(jobs.run(other))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_server(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


PUSHED = {"push": "org/smaller"}


@pytest.mark.usefixtures("no_page", "proof_in_process")
def test_a_finished_checkpoint_is_uploaded_and_one_that_misses_a_limit_is_not(
    folder, tmp_path, hub
):
    plan = planned(folder, tmp_path / "out", output=PUSHED, gates={"layer_error": 0.0})
    with pytest.raises(GateError):
        [*jobs.run(plan)]
    assert hub.commits == 0
    plan = planned(folder, tmp_path / "out", output=PUSHED, gates={"layer_error": 9.0})
    records = [*jobs.run(plan, resume=True)]
    assert [record.name for record in records[-3:-1]] == [
        "upload to org/smaller", f"{hub.url}/org/smaller/commit/1",
    ]  # fmt: skip
    checkpoints.same_bytes(hub.folder / "org/smaller", tmp_path / "out")
    card = (hub.folder / "org/smaller/README.md").read_text()
    assert 'from_pretrained("org/smaller")' in card
    assert '"out"' not in card


def test_who_cannot_upload_is_told_by_the_plan(folder, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    config = planned(folder, tmp_path / "out", output=PUSHED).config
    with pytest.raises(HubError, match=r"output\.push"):
        jobs.plan(config)
    assert jobs.plan(config, preflight=jobs.Preflight(80 * 10**9)).config == config
    sweep = write_sweep(folder, tmp_path / "out", "sparsity = [0.25, 0.5]", 'method = "obs"')
    sweep.write_text(sweep.read_text() + 'push = "org/smaller"\n')
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ConfigError, match="a sweep makes several models"):
        jobs.plan(load_config(sweep))
