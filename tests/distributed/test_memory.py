"""What a run holds at its peak is what its plan says, within 15 %.

The run is a process of its own, which has done a small one before, so that libraries are loaded. It
gives memory back at once: what the C library keeps for later is not held.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import checkpoints
from tests.distributed import configs

MEASURE = """
import json, sys
from pathlib import Path
from prunekit import planning, running
from prunekit.config import load_config

def held(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

small, large = (planning.plan(load_config(Path(name))) for name in sys.argv[1:])
[*running.run(small)]
Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
before = held("VmRSS")
[*running.run(large)]
planned = large.memory.total + large.memory.waiting * large.at_once
print(json.dumps([held("VmHWM") - before, planned]))
"""
SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 2}
PRUNE = {
    "wanda": {"method": "wanda", "pattern": "2:4", "measure_error": False},
    "sparsegpt": {"method": "sparsegpt", "pattern": "2:4"},
}
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    large = {**SIZES, "num_key_value_heads": 4}
    return {
        "small": checkpoints.write(root / "small", "llama", torch.bfloat16),
        "large": checkpoints.write(root / "large", "llama", torch.bfloat16, **large),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", PRUNE)
def test_the_peak_of_a_run_is_the_plan_within_15_percent(models, tmp_path, method):
    files = [
        configs.write(
            tmp_path / f"{name}.toml", model, tmp_path / name, prune=PRUNE[method], evaluate=None
        )
        for name, model in models.items()
    ]
    environment = os.environ | GIVE_BACK | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    measured, planned = json.loads(done.stdout.splitlines()[-1])
    assert planned == pytest.approx(measured, rel=0.15)
