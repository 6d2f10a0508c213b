"""Time contestants and compare them with the limits of the machine.

A benchmark yields cases; each holds contestants that do the same work, and the bytes and operations
that this work needs at least. The floor of a case is the longer of bytes / copy bandwidth and
operations / matrix product rate, both measured just before. A benchmark whose kernel is below half
of the floor says why, for each kind of device, in its ``WHY``.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench.harness import table
from bench.ops import roofline
from prunekit.inference.layer_speed import copy_rate, product_rate
from prunekit.models.cgroups import usable_cpus

RESULTS = Path(os.environ.get("BENCH_RESULTS") or Path(__file__).parents[1] / "results")
BUDGET_SECONDS = {"cpu": 2.0, "cuda": 0.3}  # per contestant, after one warm-up
REPEATS = (3, 100)  # at least, at most
SLEEP_CYCLES = 4_000_000  # of a GPU, about 2 ms: Python queues some 200 launches meanwhile


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        name: After a real layer, e.g. ``llama-8b.down_proj``.
        shape: The relevant sizes, e.g. ``{"T": 2048, "I": 576}``.
        dtype: Type of the matrix products, for their measured rate.
        bytes: Least memory traffic.
        flops: Least operations; a multiplication and an addition are two.
        contestants: Functions to run, ours first.
        prepare: Called before each run, not timed; for work that is done in place.
    """

    name: str
    shape: dict[str, int]
    dtype: torch.dtype
    bytes: int
    flops: int
    contestants: dict[str, Callable[[], object]]
    prepare: Callable[[], object] | None = None


def measure(op: str, bench: ModuleType, *, compile_contestants: bool = True) -> list[str]:
    """Measure a bench's cases, print them, and rewrite ``bench/results/<machine>/<op>.json``.

    Args:
        op: Name of the op.
        bench: Its module in ``bench.ops``.
        compile_contestants: False leaves out those of ``torch.compile``, which take minutes.

    Returns:
        The contestants that failed, with their errors; the others are measured.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    machine = describe(device)
    peaks: dict[str, float] = {"copy": peak_copy_rate(device)}
    rows, failed = [], []
    for case in bench.cases(device):
        floor = case.bytes / peaks["copy"]
        if case.flops:
            rate = str(case.dtype)
            if rate not in peaks:
                peaks[rate] = product_rate(device, case.dtype)
            floor = max(floor, case.flops / peaks[rate])
        for name, contestant in case.contestants.items():
            if name == "torch.compile" and not compile_contestants:
                continue
            try:
                rows.append(_row(case, name, contestant, floor, device))
            except RuntimeError as error:  # of one contestant, such as too little memory
                failed.append(f"{op} {case.name} {name}: {error}")
                print(f"FAILED {failed[-1]}", flush=True)
                continue
            _say(rows[-1])
    machine["copy_bytes_per_second"] = peaks.pop("copy")
    machine["product_flops_per_second"] = peaks
    file = RESULTS / machine["name"] / f"{op}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "why": getattr(bench, "WHY", {}).get(device.type), "rows": rows}
    file.write_text(json.dumps(result, indent=1) + "\n")
    for written in (file, *_summaries(file.parent)):
        print(f"written: {written}")
    return failed


def _summaries(folder: Path) -> list[Path]:
    """Write the plots and the table of a machine; without matplotlib, the table."""
    drawn = [roofline.draw(folder)] if importlib.util.find_spec("matplotlib") else []
    if not drawn:
        print("no roofline.png: matplotlib is not installed")
    return [*drawn, table.write(folder)]


def peak_copy_rate(device: torch.device) -> float:
    """Return the bytes read plus written per second by a copy of 4 GiB.

    On a GPU by its own clock, and of as many bytes as no cache holds a part of that matters.
    """
    if device.type != "cuda":
        return copy_rate(device)
    size = min(2**32, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.empty(size, dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    times = seconds(lambda: target.copy_(source), device, least=20)
    return 2 * size / statistics.median(times)


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """Return a function compiled by ``torch.compile``; its first call is slow."""
    torch._dynamo.reset()  # past its limit of compiled versions a function runs uncompiled
    return torch.compile(function, dynamic=False)


def seconds(
    contestant: Callable[[], object],
    device: torch.device,
    prepare: Callable[[], object] | None = None,
    least: int = REPEATS[0],
) -> list[float]:
    """Return sorted times of single calls, after one warm-up call.

    Args:
        contestant: The function to time.
        device: Where it runs.
        prepare: Called before each run, not timed.
        least: Least number of calls.
    """
    prepare = prepare or (lambda: None)
    prepare()
    _timed(contestant, device)
    most = REPEATS[1]
    budget = BUDGET_SECONDS[device.type]
    times: list[float] = []
    while len(times) < least or (sum(times) < budget and len(times) < most):
        prepare()
        times.append(_timed(contestant, device))
    return sorted(times)


def write_json(file: Path, results: dict[str, Any]) -> None:
    """Replace a file of results, so that it is never half written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(file)


def describe(device: torch.device) -> dict[str, Any]:
    """Return the machine, versions, commit and date of a measurement."""
    if device.type == "cuda":
        model = torch.cuda.get_device_name(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        model, driver = f"{_processor()} x{usable_cpus()}", None
    return {
        "name": re.sub(r"[^A-Za-z0-9]+", "-", model).strip("-").lower(),
        "model": model,
        "driver": driver,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _row(
    case: Case, name: str, contestant: Callable[[], object], floor: float, device: torch.device
) -> dict[str, Any]:
    times = seconds(contestant, device, case.prepare)
    median = statistics.median(times)
    fifth = statistics.quantiles(times, n=5, method="inclusive")
    return {
        "case": case.name,
        **case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "contestant": name,
        "milliseconds": {"median": 1e3 * median, "p20": 1e3 * fifth[0], "p80": 1e3 * fifth[3]},
        "runs": len(times),
        "host_milliseconds": 1e3 * _host_seconds(contestant, device, case.prepare),
        "share_of_floor": floor / median,
        "bytes_per_second": case.bytes / median,
        "flops_per_second": case.flops / median,
    }


def _timed(contestant: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        # By the GPU's clock, right after a flush of its cache. The GPU sleeps until all launches
        # are queued, so that Python's time does not count, however many there are.
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        _flush(device)
        torch.cuda._sleep(SLEEP_CYCLES)
        began.record()
        contestant()
        ended.record()
        torch.cuda.synchronize(device)
        return began.elapsed_time(ended) / 1e3
    start = time.perf_counter()
    contestant()
    return time.perf_counter() - start


def _host_seconds(
    contestant: Callable[[], object],
    device: torch.device,
    prepare: Callable[[], object] | None,
) -> float:
    """Return the least time of the host for queuing a call; on a CPU 0, where it does the work."""
    if device.type != "cuda":
        return 0.0
    times = []
    for _ in range(5):
        (prepare or (lambda: None))()
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        contestant()
        times.append(time.perf_counter() - start)
        torch.cuda.synchronize(device)
    return min(times)


def _flush(device: torch.device) -> None:
    """Write 256 MiB, more than any cache holds."""
    torch.empty(2**28, dtype=torch.int8, device=device).zero_()


def _say(row: dict[str, Any]) -> None:
    spread = row["milliseconds"]
    print(
        f"{row['case']:24} {row['dtype']:9} {row['contestant']:22} {spread['median']:10.3f} ms"
        f" ({spread['p20']:.3f} to {spread['p80']:.3f}), {row['share_of_floor']:.0%} of the floor",
        flush=True,
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """Return the output of a command, or None where it is missing."""
    if shutil.which(command[0]) is None:
        return None
    here = Path(__file__).parent
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, cwd=here
    )
    return done.stdout.strip() or None
