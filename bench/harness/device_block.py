"""One random block through the pruner under the profiler: how long the GPU is idle.

    python -m bench.harness.device_block FILE [METHOD …]

The block has the shape of Llama-2-7B; on a CPU a small one, to try the script.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.harness.measure import describe
from bench.jobs.memory import Shape, make, write_text
from prunekit.config.load import load_config
from prunekit.runs.jobs import plan, run

LARGE = Shape(4096, 11008, 1, 32, 32, (), (16, 2048))
SMALL = Shape(64, 176, 1, 4, 4, (), (4, 64))
CONFIG = """
[model]
path = "{model}"
[calibration]
data = "{model}/text.txt"
samples = {samples}
length = {length}
[prune]
method = "{method}"
pattern = "{pattern}"
{sparsity}
[output]
path = "{out}"
"""


def measure(folder: Path, shape: Shape, method: str, pattern: str) -> dict[str, Any]:
    """Prune the block, and return the seconds that passed and those that the GPU worked."""
    samples, length = shape.calibration
    file = folder / f"{method}-{pattern.replace(':', '-')}.toml"
    sparsity = "sparsity = 0.5" if pattern == "unstructured" else ""
    model, out = folder / "model", file.with_suffix("")
    file.write_text(CONFIG.format(**locals()))
    made = plan(load_config(file))
    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as profiler:
        start = time.perf_counter()
        for _ in run(made):
            pass
        spent = time.perf_counter() - start
    busy = [each for each in profiler.events() or [] if each.device_type == DeviceType.CUDA]
    longest: dict[str, float] = {}
    for each in busy:
        longest[each.name] = longest.get(each.name, 0.0) + each.device_time_total / 1e6
    top = sorted(longest.items(), key=lambda item: -item[1])[:20]
    return {
        "method": method,
        "pattern": pattern,
        "seconds": spent,
        "gpu_seconds": sum(longest.values()),
        "phases": json.loads((out / "report.json").read_text())["seconds"],
        "longest": dict(top),
    }


def main(target: Path, methods: list[str]) -> None:
    """Measure each method, half and 2:4, and write the file after each."""
    cuda = torch.cuda.is_available()
    shape, rows = LARGE if cuda else SMALL, []
    device = torch.device("cuda" if cuda else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "model", shape)
        write_text(folder / "model")
        for method in methods:
            for pattern in ("2:4", "unstructured"):
                rows.append(measure(folder, shape, method, pattern))
                target.write_text(json.dumps({"machine": describe(device), "rows": rows}, indent=1))
                spent, busy = rows[-1]["seconds"], rows[-1]["gpu_seconds"]
                print(f"{method:10} {pattern:13} {spent:.2f} s, GPU busy {busy:.2f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["sparsegpt", "admm"])
