"""Peak memory of a run is within 15 % of its plan.

Each run is measured in a process of its own, after the same job on one batch of samples. Libraries
are loaded by then, and what they keep for products of these shapes and this dtype (oneDNN compiles
code for each, megabytes of it for bfloat16 on AVX512 and AMX) is there: it depends on the CPU and
the library, so a plan made from shapes cannot know it. Memory that is freed is returned to the
system at once, so what the C library would keep is not counted. A block is written only once the
next one is pruned, as on a disk that is just fast enough: the plan holds on any disk.
"""

import json
import sys

import pytest
import torch

from tests.distributed import configs
from tests.support import checkpoints

MEASURE = """
import ctypes, json
from pathlib import Path
from threading import Event
from prunekit.runs import jobs
from prunekit.config.load import load_config
from prunekit.distributed.join import join
from prunekit.runs.background import Background

start, result = Background.start, Background.result
def start_late(self, job):
    self.wanted = Event()
    start(self, lambda: self.wanted.wait() and job())
def result_wanted(self):
    self.wanted.set()
    return result(self)
Background.start, Background.result = start_late, result_wanted

library = ctypes.CDLL(None)
for option, value in ((-3, 65536), (-1, 65536), (-8, 1)):  # of mmap, of trimming, of arenas
    assert library.mallopt(option, value)

def held(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def carry_out(plan):
    for record in jobs.run(plan):
        if (record.kind, record.name) == ("phase", "verify"):
            break  # which is another process

with join("cpu") as ranks:
    first, measured = (jobs.plan(load_config(Path(name)), ranks) for name in arguments)
    carry_out(first)
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    before = held("VmRSS")
    carry_out(measured)
units = isinstance(measured.memory, dict)
planned = measured.place.device if units else measured.memory.total
filed = measured.place.disk if units else measured.memory.disk
print(json.dumps([held("VmHWM") - before, planned, filed / measured.dtype.itemsize]))
"""
SIZES = {"hidden_size": 576, "intermediate_size": 2304, "num_hidden_layers": 2}
NARROW = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
UNITS = {"pattern": ["heads", "neurons"], "sparsity": 0.3}
CASES = {
    "wanda": {"method": "wanda", "pattern": "2:4", "measure_error": False},
    "sparsegpt": {"method": "sparsegpt", "pattern": "2:4"},
    "admm": {"method": "admm", "pattern": "2:4", "iterations": 2, "refine_iterations": 1},
    "on disk": {"method": "wanda", "pattern": "2:4", "propagation": "block"},
    "units by gradients of weights": {"method": "llm-pruner", **UNITS},
    "units, refitted": {"method": "obs", **UNITS},
}
SHARED = ("admm",)
"""Cases that two ranks share: an inverse then waits beside the one in use."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root, keys = tmp_path_factory.mktemp("models"), {"num_key_value_heads": 4}
    return {
        "large": checkpoints.write(root / "large", "llama", torch.bfloat16, **SIZES, **keys),
        "narrow": checkpoints.write(root / "narrow", "llama", torch.bfloat16, **NARROW, **keys),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_a_run_is_the_plan_within_15_percent(fork_server, models, tmp_path, case):
    # Hidden states on disk, of which there are more than of all else.
    on_disk = case == "on disk"
    calibration = {"length": 64, "hidden": "disk"} if on_disk else {}
    samples = {"first": 32, "measured": 320} if on_disk else {"first": 8, "measured": 8}
    files = [
        configs.write(
            tmp_path / f"{name}.toml",
            models["narrow" if on_disk else "large"],
            tmp_path / name,
            prune=CASES[case],
            evaluate=None,
            calibration=calibration | {"samples": count},
        )
        for name, count in samples.items()
    ]
    size = 2 if case in SHARED else 1
    world = fork_server.start(tmp_path / "said", size, MEASURE, *files)
    world.succeed()
    measured, planned, filed = json.loads((world.folder / "0.out").read_text())
    assert planned == pytest.approx(measured, rel=0.15)
    assert filed == (320 * 64 * NARROW["hidden_size"] if on_disk else 0)
