"""Channels in another order: the same dense model, and less lost to n:m."""

import itertools

import pytest
import torch
from pydantic import ValidationError

import prunekit
from prunekit.architectures import find_architecture
from prunekit.config.prune_table import Prune
from prunekit.errors import ConfigError
from prunekit.models import devices
from prunekit.models.layout import stack_runners
from prunekit.models.sequential.pipeline import batches, iterate_blocks
from prunekit.patterns import parse
from prunekit.runs.sparsify.run import run
from prunekit.sparsify.channel_order import find_channel_order, kept_saliency
from prunekit.sparsify.permute_channels import channel_axes, permute_channels
from tests.support.architectures import TINY, tiny
from tests.support.checkpoints import change, planned, run_whole_and_stopped, tensors, write

IDS = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(1))


def noisy(model_type):
    """Return a tiny model whose biases are not zero, as they are when it is made."""
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
        model, stack_runners(model, find_architecture(model)), None, batches(IDS, model.device)
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


@pytest.mark.parametrize("spelled", ["2:4", "1:4", "3:4"])
def test_finds_the_best_of_all_orders_of_two_groups(spelled):
    pattern = parse(spelled)
    splits = [
        torch.tensor([[0, *rest], [i for i in range(1, 8) if i not in rest]])
        for rest in itertools.combinations(range(1, 8), 3)
    ]
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):
        saliency = torch.rand(16, 8, generator=generator).square()
        chosen = find_channel_order(saliency, pattern)
        assert sorted(chosen.tolist()) == [*range(8)]
        values = [float(kept_saliency(saliency, groups, pattern.n)) for groups in splits]
        share = float(kept_saliency(saliency, chosen.view(2, 4), pattern.n)) - values[0]
        found.append(share / (max(values) - values[0] + 1e-12))
        assert share >= 0
    assert sum(value > 0.999 for value in found) >= 8
    assert sorted(found)[10] > 0.95


def test_is_an_order_though_groups_differ_by_powers_of_ten():
    """A pair swaps if both agree: what is much to one group may be too little for the other."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        spread = 3 * torch.randn(64, 64, generator=generator)
        spread += 8 * torch.randn(1, 64, generator=generator)
        assert sorted(find_channel_order(spread.exp(), parse("2:4")).tolist()) == [*range(64)]


def test_puts_large_channels_apart():
    saliency = torch.ones(8, 16)
    saliency[:, :8] = 100
    groups = find_channel_order(saliency, parse("2:4")).view(4, 4)
    assert (groups < 8).sum(1).tolist() == [2, 2, 2, 2]


def test_an_order_that_cannot_be_bettered_stays():
    saliency = torch.ones(8, 16)
    assert find_channel_order(saliency, parse("2:4")).tolist() == [*range(16)]


def test_loses_less_to_the_pattern():
    errors = []
    for permute in (False, True):
        entries = prunekit.prune(noisy("gpt2"), IDS, method="wanda", pattern="2:4", permute=permute)
        first = [entry for entry in entries if ".h.0.mlp.c_proj" in entry["name"]]
        errors += [entry["relative_error"] for entry in first]
    assert errors[1] < 0.95 * errors[0]


def test_a_run_writes_what_moved_and_goes_on_in_the_same_bytes(tmp_path):
    """Biases and skipped linears move along; the order is remembered where a run was stopped."""
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
        prunekit.prune(tiny("bloom"), IDS, method="wanda", pattern="2:4", permute=True)
    with pytest.raises(ConfigError, match="permute: needs calibration tokens"):
        prunekit.prune(tiny("llama"), method="magnitude", pattern="2:4", permute=True)
