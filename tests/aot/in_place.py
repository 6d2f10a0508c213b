"""A lint of kernels: no warp reads again what another one may have written already.

Where a tile has fewer entries than threads, warps repeat the work of others: each loads the same
entries. If they are stored in place, a late warp loads what an early one stored, unless a barrier
lies between. Read in Triton's TTGIR; pointers are followed to the kernel's arguments.
"""

import re
from collections.abc import Mapping

LAYOUT = re.compile(r"^(#\w+) = (#\w+\.\w+<\{.*\}>)", re.MULTILINE)
FUNCTION = re.compile(r"tt\.func .*?@\w+\((.*)\) attributes", re.DOTALL)
ASSIGNED = re.compile(r"^\s*(%[\w#]+)(?::\d+)? = (\S+) (.*)")
BARRIER = re.compile(r"(gpu|ttg)\.(local_)?barrier")
POINTERS = re.compile(r"tensor<([\dx]+)x!tt\.ptr<[\w<>]+>, (#.+?)>(?: |$|,|\))")
NAME = re.compile(r"%[\w#]+")
FOLLOWED = ("tt.splat", "tt.addptr", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans",
            "ttg.convert_layout", "tt.bitcast", "amdgpu.buffer_load")  # fmt: skip
READS = ("tt.load", "ttg.async_copy_global_to_local")


def repeated_loads(ttgir: str, storage: Mapping[str, int] | None = None) -> list[str]:
    """Return stores before which several warps load the same entries, with no barrier between.

    Args:
        ttgir: The kernel.
        storage: A number for each pointer argument, equal where they share memory; None: all do.
    """
    layouts = dict(LAYOUT.findall(ttgir))
    sources = _sources(ttgir)
    found: list[str] = []
    waiting: set[int] = set()  # memory whose loads are repeated since the last barrier
    for line in ttgir.splitlines():
        if BARRIER.search(line):
            waiting.clear()
        reads = any(each in line for each in READS)
        if not reads and "tt.store" not in line:
            continue
        if not (pointers := POINTERS.search(line)):
            continue  # a single number
        operands = NAME.findall(line.split("tt.store" if not reads else "load", 1)[1])
        name = _argument(operands[0], sources)
        memory = 0 if storage is None else storage[name]
        shape = [int(size) for size in pointers[1].split("x")]
        if reads and _repeats(shape, pointers[2], layouts):
            waiting.add(memory)
        elif not reads and memory in waiting:
            found.append(line.strip())
    return found


def _sources(ttgir: str) -> dict[str, str]:
    """Return the value that each pointer, or value that a loop carries, comes from."""
    found: dict[str, str] = {}
    for line in ttgir.splitlines():
        if not (assigned := ASSIGNED.match(line)):
            continue
        name, operation, rest = assigned.groups()
        if operation.startswith("scf.") and "iter_args(" in rest:
            carried = re.findall(r"(%[\w#]+) = (%[\w#]+)", rest.split("iter_args(")[1])
            found |= dict(carried)
            found |= {f"{name}#{place}": before for place, (_, before) in enumerate(carried)}
            if len(carried) == 1:
                found[name] = carried[0][1]
        elif operation.startswith(FOLLOWED):
            found[name] = NAME.findall(rest)[0]
        elif operation.startswith("arith.select"):
            found[name] = NAME.findall(rest)[1]
    return found


def _argument(name: str, sources: Mapping[str, str]) -> str:
    """Return the name of the argument that a pointer comes from."""
    while name in sources:
        name = sources[name]
    return name.removeprefix("%")


def _repeats(shape: list[int], layout: str, layouts: Mapping[str, str]) -> bool:
    """Return whether several warps hold the same entries of a tensor."""
    text = layouts.get(layout, layout)
    if text.startswith("#ttg.slice"):
        dimension, parent = re.fullmatch(r"#ttg\.slice<\{dim = (\d), parent = (.*)\}>", text).groups()
        dimension = int(dimension)
        whole = layouts.get(parent, parent)
        if whole.startswith("#ttg.blocked") and _sizes(whole, "warpsPerCTA")[dimension] > 1:
            return True
        # Of one entry in that dimension, which no other warp shares.
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
