"""Permuted channels: the same dense model, and lower errors for n:m."""

import pytest
import torch
from pydantic import ValidationError

import prunekit
from prunekit.architectures import find_architecture
from prunekit.config.prune_table import Prune
from prunekit.errors import ConfigError
from prunekit.models import devices
from prunekit.models.layout import stack_runners
from prunekit.models.sequential.pipeline import iterate_blocks, split_batches
from prunekit.runs.sparsify.run import run
from prunekit.sparsify.permute_channels import channel_axes, permute_channels
from tests.support.architectures import TINY, tiny
from tests.support.checkpoints import change, planned, run_whole_and_stopped, tensors, write

pytestmark = pytest.mark.usefixtures("no_page")

IDS = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(1))


def noisy(model_type):
    """Return a tiny model whose biases are not zero."""
    model, generator = tiny(model_type), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def answer(model):
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(IDS, **more)[0]


@pytest.mark.parametrize("model_type", sorted(TINY))
@torch.no_grad()
def test_any_order_leaves_what_the_model_answers(model_type):
    model = noisy(model_type)
    dense = answer(model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    moved = []
    for visit in iterate_blocks(
        model,
        stack_runners(model, find_architecture(model)),
        None,
        split_batches(IDS, model.device),
    ):
        found = {
            axis.name: [torch.randperm(units.shape[1]).tolist() for units in axis.reader.index]
            for axis in channel_axes(visit.module, visit.runner.stack)
        }
        assert len(found) == 2 + (model_type == "t5" and "decoder" in visit.name)
        moved += [f"{visit.name}.{path}" for path in permute_channels(visit, found)]
    torch.testing.assert_close(answer(model), dense, rtol=1e-4, atol=1e-5)
    after = dict(model.named_parameters())
    assert sorted(moved) == sorted(
        name for name, value in before.items() if not torch.equal(value, after[name])
    )


def test_loses_less_to_the_pattern():
    errors = []
    for permute in (False, True):
        entries = prunekit.prune(noisy("gpt2"), IDS, method="wanda", pattern="2:4", permute=permute)
        first = [entry for entry in entries if ".h.0.mlp.c_proj" in entry["name"]]
        errors += [entry["relative_error"] for entry in first]
    assert errors[1] < 0.95 * errors[0]


def test_a_run_writes_what_moved_and_goes_on_in_the_same_bytes(tmp_path):
    """Biases and skipped linears move along; a resumed run keeps the order."""
    folder = write(tmp_path / "m", "opt")
    prune = {"method": "admm", "pattern": "2:4", "permute": True, "skip": ["*fc1"]}
    sections = {"prune": prune, "evaluate": {"data": str(folder / "text.txt"), "length": 12}}
    whole, stopped = run_whole_and_stopped(folder, tmp_path, **sections)
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (stopped / file.name).read_bytes()
    dense, pruned = tensors(folder), tensors(stopped)
    name = "model.decoder.layers.0.fc1.weight"
    assert not torch.equal(dense[name], pruned[name])
    assert torch.equal(dense[name].sort(0).values, pruned[name].sort(0).values)


def test_what_is_stored_wider_than_it_runs_moves_without_rounding(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_multiplies_bfloat16", lambda: True)
    folder = write(tmp_path / "m", "opt", torch.bfloat16)
    name = "model.decoder.layers.0.fc1.bias"
    precise = torch.arange(64) + 1 / 3
    change(folder, name, lambda bias: precise[: len(bias)])
    made = planned(
        folder, tmp_path / "out", prune={"method": "wanda", "pattern": "2:4", "permute": True}
    )
    assert made.dtype is torch.bfloat16
    list(run(made))
    found = tensors(tmp_path / "out")[name]
    assert not torch.equal(found, precise[: len(found)])
    assert torch.equal(found.sort().values, precise[: len(found)])


def test_is_refused_where_it_means_nothing():
    rows = {"method": "wanda", "pattern": "row", "sparsity": 0.5, "permute": True}
    with pytest.raises(ValidationError, match='applies to n:m patterns only, not to "row"'):
        Prune.model_validate(rows)
    with pytest.raises(ConfigError, match=r"keep their heads and neurons\. Declare the family"):
        prunekit.prune(tiny("mamba"), IDS, method="wanda", pattern="2:4", permute=True)
    with pytest.raises(ConfigError, match="permute: needs calibration tokens"):
        prunekit.prune(tiny("llama"), method="magnitude", pattern="2:4", permute=True)
