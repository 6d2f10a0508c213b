"""The host asks for the work of a whole block without waiting for a device."""

import pytest
import torch
from prunekit_kernels import Pending, pending

from prunekit.errors import NumericsError
from prunekit.models.sequential.checks import Checks
from tests.support.architectures import tiny
from tests.support.blocks import HALF, pruning
from tests.support.waits import CountedReads, Later, device_apart

STAGES = 4
SECTIONS = {
    "wanda": ({"method": "wanda", "pattern": "2:4"}, 0),
    "wanda by rows": ({"method": "wanda", **HALF}, 0),
    # Whether each factor exists, while it is inverted.
    "sparsegpt 2:4": ({"method": "sparsegpt", "pattern": "2:4"}, STAGES),
    "sparsegpt": ({"method": "sparsegpt", **HALF}, STAGES),
    # The scale, of each inverse whether it exists, and whether attention is only
    # added to the hidden states.
    "admm": ({"method": "admm", "target": "layer", **HALF}, STAGES * (1 + 7) + 1),
    "admm 2:4": ({"method": "admm", "target": "layer", "pattern": "2:4"}, STAGES * (1 + 7) + 1),
    # And whether the regression to the dense model's outputs has a solution.
    "admm, dense": ({"method": "admm", "target": "dense", **HALF}, STAGES * (1 + 7 + 1) + 1),
}
pytestmark = pytest.mark.usefixtures("small_batches")


def first_block(section, ids, model=None):
    """Return the first block of a model, and an iterator that prunes it."""
    loaded, _, results = next(pruning(model or tiny("llama"), ids, **section))
    return loaded, results


@pytest.mark.parametrize(("section", "decisions"), SECTIONS.values(), ids=SECTIONS.keys())
def test_a_block_is_pruned_without_reading_the_device(section, decisions, ids, monkeypatch):
    _, expected = first_block(section, ids)
    expected = [result.as_record() for result in expected]
    with device_apart(monkeypatch):
        loaded, results = first_block(section, ids)
        with CountedReads() as counted:
            results = [*results]
        assert not counted.found
        assert Later.waits == decisions
        assert not any(result.is_there for result in results)
        assert all(isinstance(result.weight, Pending) for result in results)
        loaded.checks.settle()
        arrived = [result.arrived() for result in results]
    assert all(result.is_there for result in results)
    for result, record in zip(arrived, expected, strict=True):
        stored = loaded.module.get_submodule(result.linear.path).weight
        assert torch.equal(result.weight, stored)
        found = result.as_record()
        assert found.pop("seconds") > 1
        record.pop("seconds")
        assert found.pop("relative_error") == pytest.approx(record.pop("relative_error"), rel=1e-4)
        assert found == record


@pytest.mark.parametrize("section", ["wanda", "sparsegpt", "admm", "admm, dense"])
def test_inputs_that_are_not_finite_are_found_later(section, ids, monkeypatch):
    model = tiny("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[ids[4, 0]] = torch.nan
    at = next(number for number, row in enumerate(ids) if ids[4, 0] in row)
    said = rf"q_proj: its input is NaN or inf in calibration sample {at}\."
    with device_apart(monkeypatch):
        loaded, results = first_block(SECTIONS[section][0], ids, model)
        with pytest.raises(NumericsError, match=said):
            # A solver that fails asks why; others go on.
            loaded.checks.settle() if [*results] else None


def test_weights_that_are_not_finite_are_counted_later(ids, monkeypatch):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[1, 2:4] = torch.nan
    with device_apart(monkeypatch):
        section = {"method": "magnitude", "pattern": "2:4", "measure_error": False}
        loaded, results = first_block(section, ids, model)
        assert [*results]
        with pytest.raises(NumericsError, match=r"up_proj: 2 of its weights are NaN or inf"):
            loaded.checks.settle()
        loaded.checks.settle()  # it was raised once


def test_reads_are_counted():
    value, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    with CountedReads() as counted:
        value.sum().item()
        bool(value[0] > 1)
        value.tolist()
        value[mask]
        value[mask] = 1.0
        torch.tensor([1.0])
        value.cpu()
        mask.nonzero()
    assert counted.found.keys() >= {
        "item", "__bool__", "tolist", "aten::index", "tensor", "cpu", "nonzero", "aten::nonzero",
    }  # fmt: skip
    assert any("index_put" in name for name in counted.found)


def test_times_are_of_the_device(monkeypatch):
    cpu = torch.device("cpu")
    assert 0 <= pending.weighted_seconds((1.0, pending.now(cpu), pending.now(cpu))) < 1
    with device_apart(monkeypatch):
        spans = [(share, pending.now(cpu), pending.now(cpu)) for share in (0.5, 1.0)]
        found = pending.weighted_seconds(*spans)
        assert isinstance(found, Pending)
        assert pending.value_of(found) == 3.0


def test_faults_that_are_known_are_raised_at_once():
    with pytest.raises(NumericsError, match="3 faults"):
        Checks().require_none(torch.tensor(3), lambda count: NumericsError(f"{count} faults"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("section", "decisions"), SECTIONS.values(), ids=SECTIONS.keys())
def test_torch_finds_no_wait_on_a_gpu(section, decisions, ids):
    for warm in (True, False):  # first kernels are compiled, and memory is allocated
        loaded, results = first_block(section, ids.cuda(), tiny("llama").cuda())
        torch.cuda.set_sync_debug_mode("default" if warm else "error")
        try:
            results = [*results]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        loaded.checks.settle()
        assert all(result.arrived().weight.device.type == "cpu" for result in results)
