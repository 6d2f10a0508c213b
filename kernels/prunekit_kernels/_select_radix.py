"""Radix selection of thresholds for groups that span many programs.

Each pass counts, among the keys that agree with the known prefix of the threshold, how often each
next digit occurs. The program of a group that finishes last finds the digit in which the count to
prune is reached, which extends the prefix. Counts are integers, so atomic additions are
deterministic. The last pass writes. Where only some ties are pruned, its programs first count their
ties, and each waits for the counts of those before it.

Keys of 32 bits take three passes of up to 11 bits and one that writes; those of float64 scores six
and one. Nothing is copied from the host, and the host waits for nothing.
Shapes: O output features, I input features, G groups, P programs of a group.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunekit_kernels._counters import constant, zeroed
from prunekit_kernels._select_keys import DUAL
from prunekit_kernels._select_radix_kernels import count_kernel, write_kernel
from prunekit_kernels._source import Source
from prunekit_kernels._triton import INTERPRETED, multiprocessors, runs_ptx, triton
from prunekit_kernels.groups import Groups
from prunekit_kernels.packed_mask import pack

DIGITS = {
    4: ((21, 11), (10, 11), (0, 10)),
    8: ((53, 11), (42, 11), (31, 11), (20, 11), (9, 11), (0, 9)),
}
"""Shift and width of each digit by bytes of a key, from the highest; the first has the sign."""
NARROW = {torch.bfloat16: ((21, 11), (16, 5)), torch.float16: ((21, 11), (13, 8))}
"""The digits of scores with 16 bits, whose keys have lower bits that are all equal."""
BINS = 2048  # of the widest digit
TILE = 2048  # entries of a tile; at least 8 for each thread
WARPS = 4
PER_MULTIPROCESSOR = 5  # programs: as many as are resident, so that none waits for a second turn


class _Grid(NamedTuple):
    """How programs share a matrix.

    Attributes:
        groups: G.
        parts: P.
        share: Tiles of a program.
        tiles: Tiles of a group, in the order of its entries.
        across: Tiles side by side in a row of a group; where several are, each has one row.
        width: Columns of a group.
        single: Whether each group is a row.
        full: Whether tiles divide the groups, and the groups the matrix.
        tile: Rows and columns of a tile.
    """

    groups: int
    parts: int
    share: int
    tiles: int
    across: int
    width: int
    single: bool
    full: bool
    tile: tuple[int, int]


def launch(source: Source, groups: Groups, bits: Tensor) -> None:
    """Select, write the output of the source, and fill the packed bits.

    Args:
        source: Source of scores.
        groups: The groups; of single rows or of all rows, without tiles.
        bits: [O, B] uint8, filled.
    """
    grid = _grid(source.x, groups)
    if grid.groups > 1 and not grid.single and grid.width % 8:
        # Two groups share a byte.
        keep = torch.empty(source.x.shape, dtype=torch.bool, device=source.x.device)
        _launch(source, groups, grid, keep)
        bits.copy_(pack(keep))
        return
    _launch(source, groups, grid, bits)


def choose(score: Source, groups: Groups) -> Tensor:
    """Return the keep mask of scores, bool [O, I]."""
    keep = torch.empty(score.x.shape, dtype=torch.bool, device=score.x.device)
    if keep.numel():
        with torch.cuda.device_of(keep):
            _launch(score, groups, _grid(score.x, groups), keep)
    return keep


def _grid(x: Tensor, groups: Groups) -> _Grid:
    outputs, inputs = x.shape
    width = min(groups.columns or inputs, inputs)
    single = groups.rows == 1
    number = outputs if single else triton.cdiv(inputs, width)
    columns = max(8, min(TILE, triton.next_power_of_2(width)))
    across = triton.cdiv(width, columns)
    # Rows of equal tiles would not be in the order of entries.
    rows = TILE // columns if across == 1 and not single else 1
    tiles = across if single else triton.cdiv(outputs, rows) * across
    most = 3 if INTERPRETED else PER_MULTIPROCESSOR * multiprocessors(x.device)
    share = triton.cdiv(tiles, max(1, min(tiles, most // number)))
    parts = triton.cdiv(tiles, share)
    full = not (outputs % rows or width % columns or inputs % width)
    return _Grid(number, parts, share, tiles, across, width, single, full, (rows, columns))


def _launch(source: Source, groups: Groups, grid: _Grid, mask: Tensor) -> None:
    device, same = source.x.device, len(groups.pruned) == 1
    pruned = max(groups.pruned[0], 0) if same else 0
    given = source.x if same else constant(groups.pruned, device)
    state = torch.empty((grid.groups, 3), dtype=torch.int64, device=device)
    status = torch.empty(grid.groups * (grid.parts + 1), dtype=torch.int32, device=device)
    shape: dict[str, Any] = {
        "SINGLE": grid.single, "FULL": grid.full, "TILE_O": grid.tile[0], "TILE_I": grid.tile[1],
        "num_warps": WARPS, **source.options(),
    }  # fmt: skip
    place = (grid.width, grid.groups, grid.parts, grid.share, grid.tiles, grid.across)
    programs = (grid.groups * grid.parts,)
    digits = _digits(source)
    with zeroed(grid.groups * (BINS + 1), device) as counts:
        for number, (shift, width) in enumerate(digits):
            last = shift if number == len(digits) - 1 else 0
            count_kernel[programs](
                *source.arguments(), *place, pruned, given, counts, state, status,
                shift, width, last, FIRST=number == 0, SAME=same, BINS=BINS,
                PTX=runs_ptx(), WARPS=WARPS, **shape,
            )  # fmt: skip
        write_kernel[programs](
            *source.arguments(), *place, state, status, mask.view(torch.uint8), *mask.stride(),
            PACKED=mask.dtype == torch.uint8, PARTS_2=triton.next_power_of_2(grid.parts), **shape,
        )  # fmt: skip


def _digits(source: Source) -> tuple[tuple[int, int], ...]:
    """Return the digits of the keys."""
    dtype = source.x.dtype
    bare = source.kind != DUAL and source.row is None and source.scale is None
    if bare and dtype in NARROW:
        return NARROW[dtype]
    return DIGITS[8 if dtype == torch.float64 else 4]
