"""A lint of kernels: no warp reads again what another one may have written already.

Where a tile has fewer entries than threads, warps repeat the work of others: each loads the same
entries. If they are stored in place, a late warp loads what an early one stored, unless a barrier
lies between. Read in Triton's TTGIR; pointers are followed to the kernel's arguments.
"""

import re
from collections.abc import Mapping

LAYOUT = re.compile(r"^(#\w+) = (#\w+\.\w+<\{.*\}>)", re.MULTILINE)
ASSIGNED = re.compile(r"^\s*(%[\w#]+)(?::\d+)? = (\S+) (.*)")
BARRIER = re.compile(r"(gpu|ttg)\.(local_)?barrier")
POINTERS = re.compile(r"tensor<([\dx]+)x!tt\.ptr<[\w<>]+>, (#.+?)>(?: |$|,|\))")
NAME = re.compile(r"%[\w#]+")
FOLLOWED = ("tt.splat", "tt.addptr", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans",
            "ttg.convert_layout", "tt.bitcast")  # fmt: skip
MEMORY = re.compile(r"(tt\.load|tt\.store|ttg\.async_copy_global_to_local) (%[\w#]+)")


def repeated_loads(ttgir: str, storage: Mapping[str, int]) -> list[str]:
    """Return stores before which several warps load the same entries, with no barrier between.

    Args:
        ttgir: The kernel, compiled for NVIDIA.
        storage: A number for each pointer argument, equal where they share memory.
    """
    layouts = dict(LAYOUT.findall(ttgir))
    sources: dict[str, str] = {}  # so far: blocks beside each other use names again
    found: list[str] = []
    waiting: set[int] = set()  # memory whose loads are repeated since the last barrier
    for line in ttgir.splitlines():
        if BARRIER.search(line):
            waiting.clear()
        sources |= {name: sources.get(of, of) for name, of in _assigned(line).items()}
        if not (access := MEMORY.search(line)) or not (pointers := POINTERS.search(line)):
            continue  # no access, or that of a single number
        memory = storage[sources.get(access[2], access[2]).removeprefix("%")]
        if access[1] == "tt.store":
            found += [line.strip()] if memory in waiting else []
        elif _repeats([int(size) for size in pointers[1].split("x")], pointers[2], layouts):
            waiting.add(memory)
    return found


def _assigned(line: str) -> dict[str, str]:
    """Return where the pointer, or what a loop carries, that a line assigns comes from."""
    if not (assigned := ASSIGNED.match(line)):
        return {}
    name, operation, rest = assigned.groups()
    if operation.startswith("scf.") and "iter_args(" in rest:
        carried = re.findall(r"(%[\w#]+) = (%[\w#]+)", rest.split("iter_args(")[1])
        found = dict(carried)
        found |= {f"{name}#{place}": before for place, (_, before) in enumerate(carried)}
        return found | ({name: carried[0][1]} if len(carried) == 1 else {})
    operands = NAME.findall(rest)
    if operation.startswith(FOLLOWED):
        return {name: operands[0]}
    return {name: operands[1]} if operation.startswith("arith.select") else {}


def _repeats(shape: list[int], layout: str, layouts: Mapping[str, str]) -> bool:
    """Return whether several warps hold the same entries of a tensor."""
    text = layouts.get(layout, layout)
    if sliced := re.fullmatch(r"#ttg\.slice<\{dim = (\d), parent = (.*)\}>", text):
        dimension, parent = int(sliced[1]), sliced[2]
        whole = layouts.get(parent, parent)
        if "warpsPerCTA" in whole and _sizes(whole, "warpsPerCTA")[dimension] > 1:
            return True
        # The dimension that is left out repeats nothing then.
        return _repeats([*shape[:dimension], 1 << 30, *shape[dimension:]], parent, layouts)
    if text.startswith("#ttg.linear"):
        return "[0, 0]" in re.search(r"warp = (\[.*?\](?=, \w|\}))", text)[1]
    warps = _sizes(text, "warpsPerCTA")
    if text.startswith("#ttg.blocked"):
        ones, threads = _sizes(text, "sizePerThread"), _sizes(text, "threadsPerWarp")
        own = [one * many for one, many in zip(ones, threads, strict=True)]
    else:  # products of tensor cores
        own = _sizes(text, "instrShape")[: len(warps)]
        own[0] = min(own[0], 16)
    return any(
        many > 1 and size < each * many for size, each, many in zip(shape, own, warps, strict=True)
    )


def _sizes(layout: str, field: str) -> list[int]:
    return [int(each) for each in re.search(rf"{field} = \[([\d, ]+)\]", layout)[1].split(",")]
