"""Estimates of kernels from their own compiled code, beside the floor and the goal.

    python -m bench.ops.estimate [sm_90 …]

No GPU is needed, and none is measured: kernels are compiled ahead of time and their instructions
counted. ``bench/results/estimates.md`` holds the table and what it assumes.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from bench.ops.estimate_cases import Work, works
from tests.aot.compile_only import compile_only, usage
from tests.aot.listing import Listing, listing
from tests.aot.occupancy import resident_warps

FILE = Path(__file__).parents[1] / "results" / "estimates.md"
LAUNCH = 1.5e-6  # seconds between the kernels of a graph
RAMP = 1.5e-6  # seconds in which a kernel fills and drains the GPU
ISSUE = 0.8  # share of the issue slots that warps fill
LATENCY = 0.8e-6  # seconds from a load of memory to its data


class Device(NamedTuple):
    """A GPU: multiprocessors, warp instructions and bytes a second, and products a second."""

    name: str
    multiprocessors: int
    issued: float
    copied: float
    products: float


DEVICES = {
    "sm_90": Device("H200", 132, 132 * 4 * 1.98e9, 4.3e12, 790e12),
    "sm_80": Device("A100", 108, 108 * 4 * 1.41e9, 1.7e12, 280e12),
    "gfx942": Device("MI300X", 304, 304 * 2.1e9, 4.0e12, 650e12),
}
PAGE = """# Estimates from compiled code

Written by `python -m bench.ops.estimate`. **Nothing here is measured.** A kernel is compiled for
the GPU with the arguments of a real launch, and its time is the longest of

- its bytes at the speed of a copy: {copies};
- its bytes at the speed that its loads allow: bytes on their way of a warp × resident warps, within
  {latency:.1f} µs;
- its instructions, at {issue:.0%} of the issue slots ({issued});
- its matrix products, at the rate of cuBLAS,

and {ramp:.1f} µs to fill and drain the GPU, {launch:.1f} µs for each further launch of a graph.

What is assumed:

- Instructions are those of the listing, each loop as often as its bytes or steps say; what only
  some programs run counts for all. A branch back counts as a loop only where the code in between
  leads to it: ptxas puts code out of line behind a kernel's end.
- AMD: a wave of 64 takes its unit for four cycles, so that a multiprocessor issues one vector
  instruction a cycle; scalar ones have a unit of their own and count nothing. Of the loop of
  strides of salience, which does not show as one, the code around the inner loop counts once.
- Caches are not modelled: a second pass over a weight reads memory again, though 32 MiB fit the L2
  cache of an H200. Shared atomics of equal digits count as one instruction each.
- "Of the floor" is the floor over the estimate; the floor is the bytes that the work needs at the
  speed of a copy. A threshold of a whole layer needs the weight twice: which weights go is known
  only once all were read.

To check first on silicon, in this order: that sparse tensor cores take the metadata as
`tests/kernels/ptx.py` has it; whether shared atomics of equal digits, which ptxas makes
`ATOMS.POPC.INC`, take turns (time selection in a layer of equal weights against one of random
weights: the estimate says that they are alike); the latency of a load; on AMD, whether Triton's
histogram, of which a program takes 2,300 instructions a tile, is as slow as counted.

"""


class Estimate(NamedTuple):
    """Seconds, and what they come from."""

    seconds: float
    bound: str
    instructions: float
    registers: int
    resident: int
    in_flight: int
    launches: int


def estimate(work: Work, target: str) -> Estimate:
    """Compile the launches of some work, and return the estimate.

    Raises:
        ValueError: A kernel has other loops than the work says.
    """
    parts = [_kernel(work, target, *each) for each in compiled(work.run, target)]
    longest = max(parts, key=lambda part: part.seconds)
    return longest._replace(
        seconds=sum(part.seconds for part in parts) + LAUNCH * (len(parts) - 1),
        instructions=sum(part.instructions for part in parts),
        launches=len(parts),
    )


def compiled(run: Callable[[], object], target: str) -> list[tuple[Any, int]]:
    """Return each kernel that a function launches, and its number of programs."""
    grids = []
    with pytest.MonkeyPatch.context() as patch, compile_only(target, patch) as launched:
        inner = JITFunction.run

        def noted(self: Any, *args: Any, grid: Any, **options: Any) -> Any:  # noqa: ANN401
            sizes = [*grid, 1, 1][:3]
            grids.append(sizes[0] * sizes[1] * sizes[2])
            return inner(self, *args, grid=grid, **options)

        patch.setattr(JITFunction, "run", noted)
        run()
    return [*zip(launched, grids, strict=True)]


def _kernel(work: Work, target: str, kernel: Any, programs: int) -> Estimate:  # noqa: ANN401
    device, code, taken = DEVICES[target], listing(kernel), usage(kernel)
    warps, name = kernel.metadata.num_warps, kernel.metadata.name.lstrip("_")
    steps = work.steps.get(f"{name} {target}", work.steps.get(name, {}))
    streamed = work.streams.get(name, 0) / (programs * warps)
    issued, flying = _issued(code, steps, streamed)
    static = 8192 if name == "count_kernel" and target.startswith("sm") else 0
    resident = resident_warps(target, taken, warps, static)
    moved = work.moves.get(name, work.bytes)
    times = {
        "bytes": moved / device.copied,
        "issue": issued * programs * warps / (device.issued * ISSUE),
        "products": work.flops / device.products,
    }
    if flying:
        busy = min(resident * device.multiprocessors, programs * warps)
        times["latency"] = moved * LATENCY / (flying * busy)
    bound = max(times, key=lambda each: times[each])
    total = issued * programs * warps
    return Estimate(RAMP + times[bound], bound, total, taken.registers, resident, flying, 1)


def _issued(code: Listing, steps: Mapping[int, float], streamed: float) -> tuple[float, int]:
    """Return the instructions of a warp, and its bytes in flight in the loop that streams.

    Args:
        code: Of the kernel.
        steps: Trips of loops by number; 0 for those that seldom run.
        streamed: Bytes that a warp loads in the first loop that loads and is not among them.
    """
    # AMD's scalar instructions have a unit of their own.
    counts = [0.0 if each.name.startswith("s_") else 1.0 for each in code.instructions]
    flying = 0
    for number, loop in enumerate(code.loops):
        trips = steps.get(number, 1.0)
        if number not in steps and code.load_bytes(loop) and not flying:
            flying = code.in_flight(loop) or code.load_bytes(loop)
            trips = max(streamed / code.load_bytes(loop), 1.0) if streamed else 1.0
        for place in range(loop.first, loop.last + 1):
            counts[place] *= trips
    return sum(counts), flying


def table(targets: list[str]) -> str:
    """Return the page: the assumptions, then a row for each work and GPU."""
    lines = [
        "| work | GPU | floor µs | estimate µs | of the floor | goal | bound by | registers |"
        " warps | KiB in flight of a multiprocessor | launches | million instructions |",
        "|---" * 12 + "|",
    ]
    for work in works():
        for target in targets:
            if target not in work.targets:
                continue
            device, found = DEVICES[target], estimate(work, target)
            floor = max(work.bytes / device.copied, work.flops / device.products)
            lines.append(
                f"| {work.name} | {device.name} | {1e6 * floor:.1f} | {1e6 * found.seconds:.1f} |"
                f" {floor / found.seconds:.0%} | {work.goal} | {found.bound} | {found.registers} |"
                f" {found.resident} | {found.in_flight * found.resident / 1024:.0f} |"
                f" {found.launches} | {found.instructions / 1e6:.1f} |"
            )
            print(lines[-1], flush=True)
    chosen = [DEVICES[target] for target in targets]
    page = PAGE.format(
        copies=", ".join(f"{each.name} {each.copied / 1e12:.1f} TB/s" for each in chosen),
        issued=", ".join(f"{each.name} {each.issued / 1e12:.2f}·10¹² a second" for each in chosen),
        ramp=1e6 * RAMP, latency=1e6 * LATENCY, launch=1e6 * LAUNCH, issue=ISSUE,
    )  # fmt: skip
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return page + f"Compiled by {versions}.\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    chosen = sys.argv[1:] or [*DEVICES]
    FILE.write_text(table(chosen))
    print(f"written: {FILE}")
