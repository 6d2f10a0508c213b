"""Kept weights of a block, tuned to the dense block's output."""

import pytest
import torch
from pydantic import ValidationError

import prunekit
from prunekit.config.prune_table import Prune
from prunekit.errors import ConfigError
from prunekit.models.sequential import pipeline
from prunekit.sparsify import block_tuning
from tests.support.architectures import tiny
from tests.support.checkpoints import planned, run_whole_and_stopped, write

pytestmark = pytest.mark.usefixtures("no_page")

IDS = torch.randint(3, 60, (16, 12), generator=torch.Generator().manual_seed(1))
MOST = {"pattern": "unstructured", "sparsity": 0.7}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(block_tuning, "STEPS", 40)
    monkeypatch.setitem(pipeline.BATCH_TOKENS, "cpu", 96)


def pruned(model_type, method, **settings):
    model = tiny(model_type)
    entries = prunekit.prune(model, IDS, method=method, **MOST, **settings)
    return model, entries


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5"])
def test_blocks_come_nearer_and_masks_stay(model_type):
    before, _ = pruned(model_type, "wanda")
    after, entries = pruned(model_type, "wanda", recover="block")
    assert all(entry["recovered_error"] < 0.9 * entry["block_error"] for entry in entries)
    first = entries[0]["name"].rpartition(".")[0]
    dense = dict(tiny(model_type).named_parameters())
    for name, value in after.named_parameters():
        if name.startswith(first):
            assert torch.equal(value == 0, before.get_parameter(name) == 0)
        if f"{name.removesuffix('.weight')}" not in {entry["name"] for entry in entries}:
            assert torch.equal(value, dense[name])
        assert value.grad is None


@pytest.mark.parametrize("propagation", ["block", "stage"])
def test_what_is_said_of_the_error_is_what_the_model_does(propagation):
    """The last block's error equals that of recomputed hidden states."""
    model, entries = pruned("llama", "sparsegpt", recover="block", propagation=propagation)
    with torch.no_grad():
        dense, ours = (
            each(IDS, output_hidden_states=True).hidden_states for each in (tiny("llama"), model)
        )
    error = (ours[1] - dense[1]).square().sum() / dense[1].square().sum()
    assert float(error) == pytest.approx(entries[0]["recovered_error"], rel=1e-3)


def test_what_cannot_be_bettered_stays_to_the_bit(monkeypatch):
    monkeypatch.setattr(block_tuning, "RATE", 1e6)
    plain, _ = pruned("llama", "sparsegpt")
    wild, entries = pruned("llama", "sparsegpt", recover="block")
    assert entries[0]["recovered_error"] == entries[0]["block_error"]
    for name, value in plain.named_parameters():
        assert torch.equal(value, wild.get_parameter(name)), name


def test_a_stopped_run_goes_on_in_the_same_bytes(tmp_path):
    folder = write(tmp_path / "m", dtype=torch.bfloat16)
    sections = {"prune": {"method": "admm", "recover": "block", **MOST}}
    whole, stopped = run_whole_and_stopped(folder, tmp_path, **sections)
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (stopped / file.name).read_bytes()


def test_the_plan_counts_it_and_tokens_are_needed(tmp_path):
    folder = write(tmp_path / "m")
    plans = [
        planned(folder, tmp_path / "out", prune={"method": "sparsegpt", **MOST, **more})
        for more in ({}, {"recover": "block"})
    ]
    plain, recovered = (plan.memory for plan in plans)
    assert recovered.hidden == 2 * plain.hidden
    assert recovered.block > 2 * plain.block
    with pytest.raises(ConfigError, match="recover block: needs calibration tokens"):
        prunekit.prune(tiny("llama"), method="magnitude", recover="block", **MOST)
    with pytest.raises(ValidationError, match="allows only 1 step"):
        Prune.model_validate({"method": "wanda", "recover": "block", "steps": 2, **MOST})
