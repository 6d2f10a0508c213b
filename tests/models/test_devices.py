"""Devices named in a config, and the dtypes in which they compute."""

import subprocess
import sys

import pytest
import torch

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import CheckpointError, ConfigError
from prunekit.models.devices import (
    compute_dtype,
    loss_dtype,
    resolve_device,
    stored_dtype,
    synchronized_seconds,
)
from tests.conftest import ROOT
from tests.support import checkpoints

CPU = torch.device("cpu")


@pytest.mark.parametrize("units", [True, False])
def test_blocks_run_in_the_stored_dtype_where_it_is_native(tmp_path, monkeypatch, units):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    folder = checkpoints.write(tmp_path, dtype=torch.bfloat16)
    checkpoints.change(folder, "model.norm.weight", lambda weight: weight.float())
    stored = stored_dtype(open_checkpoint(folder))
    assert stored == torch.bfloat16
    assert compute_dtype(stored, CPU) == (torch.bfloat16 if units else torch.float32)
    assert compute_dtype(torch.float16, CPU) == torch.float32
    assert compute_dtype(stored, torch.device("cuda")) == torch.bfloat16
    assert loss_dtype(stored, CPU) == torch.float32
    assert loss_dtype(stored, torch.device("cuda")) == torch.bfloat16


def test_what_cannot_be_computed_with_does_not_count(tmp_path):
    folder = checkpoints.write(tmp_path, dtype=torch.float16)
    held = checkpoints.tensors(folder)
    checkpoints.save(folder, held | {"scales": torch.zeros(10**6).to(torch.float8_e5m2)})
    assert stored_dtype(open_checkpoint(folder)) == torch.float16
    checkpoints.save(folder, {"only": torch.arange(3)})
    with pytest.raises(CheckpointError, match="holds no weight in float64, float32, float16 or"):
        stored_dtype(open_checkpoint(folder))


def test_a_device_that_is_not_available_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    with pytest.raises(ConfigError, match='"cuda:1" is not available: PyTorch sees 1 GPUs'):
        resolve_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    for name in ("cuda", "cuda:0", "gpu"):
        with pytest.raises(ConfigError, match=f'"{name}" is not .* Choose'):
            resolve_device(name)


def test_the_clock_never_goes_back():
    first = synchronized_seconds(CPU)
    assert synchronized_seconds(CPU) >= first


def test_importing_devices_imports_no_torch():
    code = "import sys, prunekit.models.devices; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
