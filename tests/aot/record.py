"""Write ``bench/results/aot.json``: the resources of every kernel.

``python -m tests.aot.record [OP …]``, in the root of the checkout; with ops, only their rows are
written anew. Another version of Triton is recorded beside, for the same targets:

    pip install --target DIR --no-deps triton==3.6.0
    PYTHONPATH=DIR:.:kernels python -m tests.aot.record --beside [OP …]
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import triton

from prunekit.models.cgroups import usable_cpus
from tests.aot.compile_only import KEY_DIGITS, TARGETS, compile_only, usage
from tests.aot.in_place import repeated_loads
from tests.aot.launches import Launch, everywhere, launches
from tests.aot.listing import Listing, listing
from tests.aot.occupancy import resident_warps

STATIC = 8192  # bytes of shared memory in which selection counts
FILE = Path(__file__).parents[2] / "bench" / "results" / "aot.json"


def key(target: str, launch: Launch) -> tuple[str, str, str]:
    """Return the key of a row, without its kernel."""
    return target, launch.op, launch.what


def rows(target: str, ops: set[str]) -> list[dict]:
    """Compile ops for one target; return a row per kernel."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for launch in launches():
            if target in launch.targets and launch.op in ops:
                with compile_only(target, patch) as launched:
                    launch.run()
                found += compiled(target, launch, launched)
                print(target, launch, flush=True)  # noqa: T201  a command
    return found


def compiled(target: str, launch: Launch, launched: list) -> list[dict]:
    """Return a row per kernel of a launch; repeated launches count once.

    Raises:
        ValueError: A kernel for NVIDIA reads in place what another warp may have written.
    """
    for kernel in launched:
        if "cubin" in kernel.asm and (lines := repeated_loads(kernel.asm["ttgir"], kernel.storage)):
            raise ValueError(f"{target} {launch}, {kernel.metadata.name}: {lines}")
    found = (_row(target, launch, kernel) for kernel in launched)
    return [json.loads(row) for row in dict.fromkeys(map(json.dumps, found))]


def _row(target: str, launch: Launch, kernel) -> dict:
    taken, code = usage(kernel), listing(kernel)
    warps = kernel.metadata.num_warps
    static = STATIC if kernel.metadata.name == "count_kernel" and target.startswith("sm") else 0
    return {
        "target": target,
        "op": launch.op,
        "what": launch.what,
        "kernel": kernel.metadata.name.lstrip("_"),
        "key": kernel.hash[:KEY_DIGITS],
        "warps": warps,
        "registers": taken.registers,
        "spilled": taken.spilled,
        "shared": taken.shared,
        "resident_warps": resident_warps(target, taken, warps, static),
        "instructions": len(code.instructions),
        "in_flight": streamed(code),
    }


def streamed(code: Listing) -> int:
    """Return the bytes that a warp has on their way in the loop that loads most."""
    return max((code.in_flight(loop) for loop in code.loops), default=0)


def beside(chosen: list[str]) -> None:
    """Write the rows of the chosen ops, or of all, for a version beside."""
    whole = json.loads(FILE.read_text())
    if whole["versions"]["triton"] == triton.__version__:
        sys.exit(f"triton {triton.__version__} is the version of the record itself.")
    ops = set(chosen) or {launch.op for launch in launches()}
    kept = whole.get("beside", {}).get(triton.__version__, [])
    whole.setdefault("beside", {})[triton.__version__] = _anew(kept, ops)
    _write(whole)


def _anew(old: list[dict], ops: set[str]) -> list[dict]:
    """Return rows of which those of some ops are compiled anew, in the order of launches."""
    order = {key(*each): place for place, each in enumerate(everywhere())}
    found = [row for row in old if row["op"] not in ops and _key(row) in order]
    with ProcessPoolExecutor(usable_cpus()) as pool:
        for part in pool.map(rows, TARGETS, [ops] * len(TARGETS)):
            found += part
    return sorted(found, key=lambda row: order[_key(row)])


def _write(whole: dict) -> None:
    """Write the record, a row a line."""
    parts = [f'"versions": {json.dumps(whole["versions"])}', f'"rows": {_lines(whole["rows"])}']
    found = [f'"{name}": {_lines(each)}' for name, each in whole.get("beside", {}).items()]
    if found:
        parts.append(f'"beside": {{{", ".join(found)}}}')
    FILE.write_text(f"{{{', '.join(parts)}}}\n")


def _lines(found: list[dict]) -> str:
    return "[\n" + ",\n".join(map(json.dumps, found)) + "\n]"


def main(chosen: list[str]) -> None:
    """Write the rows of the chosen ops, or of all."""
    if "--beside" in chosen:
        beside([op for op in chosen if op != "--beside"])
        return
    ops = {launch.op for launch in launches()}
    if unknown := set(chosen) - ops:
        sys.exit(f"no such op: {', '.join(sorted(unknown))}. Choose: {', '.join(sorted(ops))}.")
    anew = set(chosen) or ops
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    old = json.loads(FILE.read_text()) if anew != ops else {"versions": versions, "rows": []}
    if old["versions"] != versions:
        sys.exit(f"the other rows are of {old['versions']}, these would be of {versions}: do all.")
    others = json.loads(FILE.read_text()).get("beside", {}) if FILE.exists() else {}
    _write({"versions": versions, "rows": _anew(old["rows"], anew), "beside": others})


def _key(row: dict) -> tuple[str, str, str]:
    return row["target"], row["op"], row["what"]


if __name__ == "__main__":
    main(sys.argv[1:])
