"""Write ``bench/results/aot.json``: what every kernel takes on GPUs that need not be here.

``python -m tests.aot.record``, in the root of the checkout.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import triton

from tests.aot.compile_only import TARGETS, compile_only, usage
from tests.aot.launches import Launch, launches

FILE = Path(__file__).parents[2] / "bench" / "results" / "aot.json"


def key(target: str, launch: Launch) -> tuple[str, str, str]:
    """Return what tells a row from the others, but for its kernel."""
    return target, launch.op, launch.what


def rows(target: str) -> list[str]:
    """Compile everything for one target and return a row of JSON for each kernel."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for launch in (launch for launch in launches() if target in launch.targets):
            with compile_only(target, patch) as launched:
                launch.run()
            found += map(json.dumps, compiled(target, launch, launched))
            print(target, launch, flush=True)  # noqa: T201  a command
    return found


def compiled(target: str, launch: Launch, launched: list) -> list[dict]:
    """Return a row for each kernel of a launch, for those that are launched again but one."""
    found = (_row(target, launch, kernel) for kernel in launched)
    return [json.loads(row) for row in dict.fromkeys(map(json.dumps, found))]


def _row(target: str, launch: Launch, kernel) -> dict:
    taken = usage(kernel)
    return {
        "target": target,
        "op": launch.op,
        "what": launch.what,
        "kernel": kernel.metadata.name.lstrip("_"),
        "warps": kernel.metadata.num_warps,
        "registers": taken.registers,
        "spilled": taken.spilled,
        "shared": taken.shared,
    }


def main() -> None:
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        lines = ",\n".join(row for part in pool.map(rows, TARGETS) for row in part)
    FILE.write_text(f'{{"versions": {json.dumps(versions)}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
