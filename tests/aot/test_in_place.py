"""No warp of a kernel that works in place reads what another one has written already.

Where a tile has fewer entries than threads, Triton lets warps repeat the work of others: each loads
the same entries and stores them again, whenever it gets there.
"""

import os
import re
from dataclasses import replace

import pytest

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
    ),
]

pytest.importorskip("triton")

from prunekit_kernels import Groups, _select, _select_radix, _source  # noqa: E402

from tests.aot.compile_only import compile_only  # noqa: E402
from tests.aot.launch import BF16, meta  # noqa: E402

LAYOUT = re.compile(
    r"(#\w+) = #ttg\.blocked<\{sizePerThread = \[([\d, ]+)\], threadsPerWarp = \[([\d, ]+)\], "
    r"warpsPerCTA = \[([\d, ]+)\]"
)
STORE = re.compile(r"tt\.store .*: tensor<([\dx]+)x!tt\.ptr<(\w+)>, (#\w+)>")
BARRIER = re.compile(r"(gpu|ttg)\.(local_)?barrier")
GROUPS = {
    "row": Groups(1, None, (3,)),
    "2:4": Groups(1, 4, (2,)),
    "3:5": Groups(1, 5, (2,)),
    "layer": Groups(None, None, (40,)),
    "windows": Groups(None, 20, (40, 50, 60, 70, 80)),
    "block 4x4": Groups(None, None, (4,), (4, 4)),
}


def repeated_stores(ttgir):
    """Return stores of floats that several warps make, with no barrier between loads and them."""
    layouts = {
        name: [[int(each) for each in part.split(",")] for part in parts]
        for name, *parts in LAYOUT.findall(ttgir)
    }
    found, waits = [], False
    for line in ttgir.splitlines():
        if "tt.load" in line:
            waits = False
        if BARRIER.search(line):
            waits = True
        if not (store := STORE.search(line)) or store[2].startswith("i"):
            continue
        sizes = [int(size) for size in store[1].split("x")]
        for size, one, threads, warps in zip(sizes, *layouts[store[3]], strict=True):
            if warps > 1 and size < one * threads * warps and not waits:
                found.append(line.strip())
    return found


def compiled(inputs, groups, monkeypatch):
    sources = [_source.iterate(meta(8, inputs), meta(8, inputs), 1.5, meta(8, inputs))]
    sources += [_source.weights(meta(8, inputs, dtype=BF16), meta(inputs), None, None)]
    if groups.rows is None and groups.columns:
        groups = replace(groups, pruned=groups.pruned[: -(-inputs // groups.columns)])
    with compile_only("sm_90", monkeypatch) as launched:
        for source in sources:
            _select.launch(source, groups)
    return [kernel.asm["ttgir"] for kernel in launched]


@pytest.mark.parametrize("inputs", [20, 40, 100])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_no_warp_repeats_a_store_in_place(groups, inputs, monkeypatch):
    kernels = compiled(inputs, groups, monkeypatch)
    assert any(STORE.search(each) for each in kernels)
    assert not [line for each in kernels for line in repeated_stores(each)]


def test_tiles_of_64_entries_would_repeat_stores(monkeypatch):
    monkeypatch.setattr(_select_radix, "TILE", 64)
    kernels = compiled(40, GROUPS["layer"], monkeypatch)
    assert [line for each in kernels for line in repeated_stores(each)]
