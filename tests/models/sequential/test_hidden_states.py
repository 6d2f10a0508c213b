"""Hidden states offloaded to main memory or disk are bit-identical."""

import errno
import os
import tempfile
from functools import partial
from io import StringIO
from pathlib import Path
from threading import Event

import pytest
import torch
from rich.console import Console

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.distributed.ranks import Ranks
from prunekit.errors import CapacityError, ConfigError
from prunekit.evaluation.perplexity import evaluate
from prunekit.models import memory
from prunekit.models.sequential import hidden_states, pipeline
from prunekit.models.sequential.hidden_states import (
    MmapStates,
    PinnedHostStates,
    choose_offload,
    scratch,
    store,
)
from prunekit.runs import preflight
from prunekit.runs.preflight import Preflight
from prunekit.runs.sparsify import planner
from prunekit.runs.sparsify.run import run
from prunekit.sparsify.block_pruner import BlockPruner
from tests.support import checkpoints
from tests.support.checkpoints import planned

CPU = torch.device("cpu")
WANDA = {"method": "wanda", "pattern": "2:4"}
RECIPES = {
    "admm, beside the dense model": ("llama", {"method": "admm", "pattern": "2:4"}),
    "wanda, blocks tuned": ("llama", WANDA | {"recover": "block"}),
    "sparsegpt of dense inputs": (
        "llama",
        {"method": "sparsegpt", "pattern": "2:4", "propagation": "none"},
    ),
    "wanda, encoder and decoder": ("t5", WANDA),
}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr("prunekit.reports.report.render", lambda report: "")
    monkeypatch.setattr("prunekit.sparsify.block_tuning.STEPS", 3)
    monkeypatch.setitem(pipeline.BATCH_TOKENS, "cpu", 24)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


def test_hidden_states_stay_where_they_lie_as_long_as_they_fit():
    first, other = torch.zeros(2, 3), torch.zeros(2, 3)
    states = [first, other]
    store(states, 0, torch.ones(2, 3))
    assert states[0] is first
    assert first.eq(1).all()
    for value in (torch.ones(2, 3).double(), torch.ones(2, 4)):
        store(states, 1, value)
        assert states[1] is value
    assert not other.any()


def test_both_models_of_a_run_have_hidden_states_of_their_own_in_one_place(
    llama, tmp_path, monkeypatch
):
    seen, blocks = set(), []
    prune = BlockPruner.prune

    def record_hidden_states(pruner, visit, plan, *known):
        blocks.append(plan)
        for stream in visit.streams:
            seen.update((stream is visit, hidden.data_ptr()) for hidden in stream.hidden)
        return prune(pruner, visit, plan, *known)

    monkeypatch.setattr(BlockPruner, "prune", record_hidden_states)
    list(run(planned(llama, tmp_path / "out", prune={"method": "admm"})))
    assert len(blocks) == 3
    assert len(seen) == 2 * 2  # in two batches
    assert len({place for _, place in seen}) == len(seen)


@pytest.mark.parametrize(
    "kind", [PinnedHostStates, partial(MmapStates, folder=Path())], ids=["host", "disk"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_elsewhere_comes_back_bit_for_bit(kind, dtype):
    values = [torch.randn(2, 3, 5).to(dtype), torch.randn(5, 700, 3).to(dtype).mT, torch.ones(1, 1)]
    kept = kind(CPU)
    kept.extend(values)
    assert len(kept) == 3
    for found, value in zip(kept, values, strict=True):
        assert found.dtype == value.dtype
        assert torch.equal(found, value)
    kept[1] = values[1] + 1
    kept[0].zero_()  # a copy
    assert torch.equal(kept[1], values[1] + 1)
    assert torch.equal(kept[0], values[0])
    kept[:] = [value * 2 for value in values]
    assert torch.equal(kept[1], values[1] * 2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_hidden_states_on_disk_change_no_byte(tmp_path, recipe, monkeypatch):
    model_type, prune = RECIPES[recipe]
    model, made = checkpoints.write(tmp_path / "m", model_type), []

    class Counted(MmapStates):
        def __init__(self, *arguments):
            made.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr(hidden_states, "MmapStates", Counted)
    for where in ("device", "disk"):
        calibration = {"data": str(model / "text.txt"), "hidden": where}
        plan = planned(model, tmp_path / where, prune=prune, calibration=calibration)
        report = [*run(plan)][-1].values
        assert report["calibration"]["hidden"] == where
        assert bool(made) == (where == "disk")
    near, far = (
        {file.name: file.read_bytes() for file in (tmp_path / where).glob("*.safetensors")}
        for where in ("device", "disk")
    )
    assert near == far != {}
    assert not [*(tmp_path / "disk").glob(".*")]


def test_perplexity_does_not_depend_on_where_hidden_states_are(llama, monkeypatch):
    found, folders = [], []

    class Seen(MmapStates):
        def __init__(self, device, folder):
            folders.append(folder)
            super().__init__(device, folder)

    monkeypatch.setattr(hidden_states, "MmapStates", Seen)
    for free in (10**12, 10):
        monkeypatch.setattr(hidden_states, "free_bytes", lambda _, free=free: free)
        found.append(evaluate(str(llama), [str(llama / "text.txt")], 12, 9))
    assert found[0] == found[1]
    assert {*folders} == {llama}  # in the model folder, since /tmp is often small


def test_what_cannot_be_written_to_is_no_place_for_hidden_states(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert scratch(tmp_path) == Path(tempfile.gettempdir())


def test_a_full_disk_is_said_before_it_is_written_to(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match="the disk is full"):
        MmapStates(CPU, tmp_path).extend([torch.ones(3)])


def test_the_plan_says_where_hidden_states_are_and_why(llama, tmp_path, monkeypatch):
    def plan_and_line(**calibration):
        calibration = {"data": str(llama / "text.txt"), **calibration}
        console = Console(width=300, record=True, file=StringIO())
        plan = planned(llama, tmp_path / "out", calibration=calibration)
        console.print(plan.describe())
        lines = console.export_text().splitlines()
        line = next(line.strip() for line in lines if line.startswith("hidden states "))
        return plan, line

    plan, line = plan_and_line()
    assert "it has room" in line
    assert plan.memory.where == "device"
    enough = int((plan.memory.total - plan.memory.hidden / 2) * memory.ESTIMATE_MARGIN)
    monkeypatch.setattr(preflight, "free_bytes", lambda _: enough)
    plan, line = plan_and_line()
    assert plan.memory.where == "disk"
    assert "with them cpu would need" in line
    plan, line = plan_and_line(hidden="disk")
    assert line.endswith("as calibration.hidden asks")


def test_too_little_main_memory_beside_a_gpu_is_refused(llama, tmp_path):
    config = planned(llama, tmp_path / "out").config
    config = config.model_copy(
        update={"calibration": config.calibration.model_copy(update={"hidden": "host"})}
    )
    planner.plan(config, Ranks(), Preflight(10**9, 10**9))
    with pytest.raises(CapacityError, match=r'main memory, .*Set calibration.hidden = "disk"'):
        planner.plan(config, Ranks(), Preflight(10**9, 10**3))


def test_a_stopped_run_goes_on_with_hidden_states_elsewhere(llama, tmp_path):
    def plan(where):
        calibration = {"data": str(llama / "text.txt"), "hidden": where}
        return planned(llama, tmp_path / "out", calibration=calibration)

    records = run(plan("device"))
    for record in records:
        if record.kind == "block":
            records.close()
    assert [*run(plan("disk"), resume=True)][-1].kind == "finish"


def test_hidden_means_nothing_where_the_whole_model_is_in_memory(llama, tmp_path):
    from prunekit.config.load import load_config

    file = tmp_path / "config.toml"
    text = (
        f'[model]\npath = "{llama}"\n[calibration]\ndata = "pydoc:train"\nhidden = "disk"\n'
        '[prune]\nmethod = "magnitude"\npattern = "heads"\nsparsity = 0.5\n[output]\npath = "o"\n'
    )
    file.write_text(text)
    assert load_config(file).calibration.hidden == "disk"
    training = "[train]\nsteps = 2\n"
    file.write_text(text + training)
    assert load_config(file).calibration.hidden == "disk"  # units go before the training
    file.write_text(text.replace("[output]", "end = 2\n[output]") + training)
    with pytest.raises(ConfigError, match=r"hidden: does not apply with \[train\]"):
        load_config(file)


def test_entries_know_where_their_bytes_are(llama):
    checkpoint = open_checkpoint(llama)
    for name, tensor in checkpoint.read(checkpoint.entries).items():
        entry = checkpoint.entries[name]
        content = entry.file.read_bytes()[entry.start : entry.start + entry.nbytes]
        assert content == tensor.contiguous().view(torch.uint8).numpy().tobytes()
    checkpoint.warm_page_cache(checkpoint.entries, Event())


def test_more_than_half_of_what_is_free_goes_to_disk(monkeypatch):
    monkeypatch.setattr(hidden_states, "free_bytes", lambda _: 100)
    assert [choose_offload(size, CPU) for size in (50, 51)] == ["device", "disk"]
