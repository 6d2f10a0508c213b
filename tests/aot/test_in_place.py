"""No warp of a kernel that works in place reads what another one has written already.

Where a tile has fewer entries than threads, Triton lets warps repeat the work of others: each loads
the same entries and stores them again, whenever it gets there.
"""

import os
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
from tests.aot.in_place import MEMORY, repeated_loads  # noqa: E402
from tests.aot.launch import BF16, meta  # noqa: E402

GROUPS = {
    "row": Groups(1, None, (3,)),
    "2:4": Groups(1, 4, (2,)),
    "3:5": Groups(1, 5, (2,)),
    "layer": Groups(None, None, (40,)),
    "windows": Groups(None, 20, (40, 50, 60, 70, 80)),
    "block 4x4": Groups(None, None, (4,), (4, 4)),
}


def compiled(inputs, groups, monkeypatch):
    sources = [_source.iterate(meta(8, inputs), meta(8, inputs), 1.5, meta(8, inputs))]
    sources += [_source.weights(meta(8, inputs, dtype=BF16), meta(inputs), None, None)]
    if groups.rows is None and groups.columns:
        groups = replace(groups, pruned=groups.pruned[: -(-inputs // groups.columns)])
    with compile_only("sm_90", monkeypatch) as launched:
        for source in sources:
            _select.launch(source, groups)
    return [(kernel.asm["ttgir"], kernel.storage) for kernel in launched]


@pytest.mark.parametrize("inputs", [20, 40, 100])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_no_warp_reads_what_another_wrote(groups, inputs, monkeypatch):
    """What :mod:`tests.aot.record` holds for every launch, here for small tiles."""
    kernels = compiled(inputs, groups, monkeypatch)
    assert all(MEMORY.search(code) for code, _ in kernels)
    assert not [line for each in kernels for line in repeated_loads(*each)]


def test_tiles_of_64_entries_would_be_read_again(monkeypatch):
    monkeypatch.setattr(_select_radix, "TILE", 64)
    kernels = compiled(40, GROUPS["layer"], monkeypatch)
    assert [line for each in kernels for line in repeated_loads(*each)]


CODE = """
#a = #ttg.blocked<{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [4], order = [0]}>
#b = #ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [1, 32], warpsPerCTA = [4, 1]}>
    %p = tt.splat %x_ptr : !tt.ptr<f32> -> tensor<SIZEx!tt.ptr<f32>, LAYOUT>
    %q = tt.splat %y_ptr : !tt.ptr<f32> -> tensor<SIZEx!tt.ptr<f32>, LAYOUT>
    %r = tt.addptr %p, %i : tensor<SIZEx!tt.ptr<f32>, LAYOUT>, tensor<SIZExi32, LAYOUT>
    %v = tt.load %r, %m : tensor<SIZEx!tt.ptr<f32>, LAYOUT>
    BARRIER
    tt.store %q, %v, %m : tensor<SIZEx!tt.ptr<f32>, LAYOUT>
"""


@pytest.mark.parametrize(
    ("size", "layout", "barrier", "storage", "found"),
    [
        (128, "#a", "", (1, 1), 0),
        (64, "#a", "", (1, 1), 1),
        (64, "#a", "ttg.barrier local", (1, 1), 0),
        (64, "#a", "", (1, 2), 0),
        (32, "#ttg.slice<{dim = 0, parent = #b}>", "", (1, 1), 1),
        (4, "#ttg.slice<{dim = 1, parent = #b}>", "", (1, 1), 0),
        (2, "#ttg.slice<{dim = 1, parent = #b}>", "", (1, 1), 1),
    ],
)
def test_what_the_lint_finds(size, layout, barrier, storage, found):
    code = CODE.replace("SIZE", str(size)).replace("LAYOUT", layout).replace("BARRIER", barrier)
    assert len(repeated_loads(code, dict(zip(("x_ptr", "y_ptr"), storage, strict=True)))) == found
