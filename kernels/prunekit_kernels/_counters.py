"""Small integers that kernels count in, on the device.

A fill costs a launch, and a copy from main memory makes the host wait. So zeros are kept: kernels
leave them as they found them. Counts that repeat are kept as well.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor

LARGEST = 1 << 21  # numbers kept; a selection in rows of more than 32768 entries may need more
CONSTANTS = 64  # tuples of counts kept

_zeros: dict[tuple, Tensor] = {}
_constants: dict[tuple, Tensor] = {}


@contextmanager
def zeroed(size: int, device: torch.device) -> Iterator[Tensor]:
    """Yield at least ``size`` int32 zeros, which are zero again at the end.

    They are kept for the next call on the same stream. A graph that is captured gets its own, which
    one more launch fills.

    Args:
        size: How many.
        device: Where.
    """
    if _captured(device) or size > LARGEST:
        yield torch.zeros(size, dtype=torch.int32, device=device)
        return
    # Taken out meanwhile: after an error they may hold anything, and are not put back.
    kept = _zeros.pop(_place(device), None)
    if kept is None or len(kept) < size:
        kept = torch.zeros(size, dtype=torch.int32, device=device)
    yield kept
    _zeros[_place(device)] = kept


def constant(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return the counts, at least 0, as int64 on the device.

    They are kept for later calls, and must not be changed.
    """
    if _captured(device):
        return _filled(counts, device)
    key = (*_place(device), *counts)
    if key not in _constants:
        while len(_constants) >= CONSTANTS:
            _constants.pop(next(iter(_constants)))
        _constants[key] = _filled(counts, device)
    return _constants[key]


def _filled(counts: Sequence[int], device: torch.device) -> Tensor:
    """Fill runs of equal counts, which copies nothing from main memory."""
    found, start = torch.empty(len(counts), dtype=torch.int64, device=device), 0
    for count, run in groupby(counts):
        end = start + len([*run])
        found[start:end] = max(count, 0)
        start = end
    return found


def _captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _place(device: torch.device) -> tuple:
    """Return the key of kept counters: each stream has its own.

    Work on another stream is not in order with it.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return device, stream
