"""Hidden states of batches where there is room for them: on the device, in main memory, on disk.

Wherever they are, what is asked for is given where blocks run, with the same bits.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor

from prunekit.checkpoint.atomic import names_a_full_disk
from prunekit.models.memory import free, free_host

Where = Literal["device", "host", "disk"]
REGION = 1 << 30
"""Bytes of a file that are mapped at once: each map holds a descriptor, which are few."""


class OffloadedHiddenStates:
    """Hidden states of each batch that are not where blocks run.

    Attributes:
        device: Where blocks run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, number: int) -> Tensor:
        return self._kept[number].to(self.device, non_blocking=True, copy=True)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))

    @overload
    def __setitem__(self, number: int, value: Tensor) -> None: ...
    @overload
    def __setitem__(self, number: slice, value: Iterable[Tensor]) -> None: ...
    def __setitem__(self, number: int | slice, value: Tensor | Iterable[Tensor]) -> None:
        if isinstance(number, slice):
            for each, part in zip(range(len(self))[number], value, strict=True):
                self[each] = part
        else:
            assert isinstance(value, Tensor)
            self._kept[number].copy_(value, non_blocking=True)

    def extend(self, values: Iterable[Tensor]) -> None:
        """Keep more batches."""
        for value in values:
            self._kept.append(self._place(value))
            self[len(self) - 1] = value

    def _place(self, like: Tensor) -> Tensor:
        raise NotImplementedError


class PinnedHostStates(OffloadedHiddenStates):
    """In pinned main memory, which a GPU reads and writes by itself."""

    def _place(self, like: Tensor) -> Tensor:
        pinned = self.device.type == "cuda"
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)


class MmapStates(OffloadedHiddenStates):
    """In a memory-mapped file without a name, which is gone when the process is.

    What was read or written leaves the process's memory at once; the system keeps of the file what
    it has room for.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        super().__init__(device)
        self._folder = folder
        with tempfile.TemporaryFile(dir=folder) as file:
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)
        self._maps: list[mmap.mmap] = []
        self._used = 0
        self._spans: list[tuple[mmap.mmap, int, int]] = []

    def __getitem__(self, number: int) -> Tensor:
        value = self._kept[number].to(self.device, copy=True)
        self._leave(number)
        return value

    @overload
    def __setitem__(self, number: int, value: Tensor) -> None: ...
    @overload
    def __setitem__(self, number: slice, value: Iterable[Tensor]) -> None: ...
    def __setitem__(self, number: int | slice, value: Tensor | Iterable[Tensor]) -> None:
        super().__setitem__(number, value)  # pyright: ignore
        if isinstance(number, int):
            self._leave(number)

    def _leave(self, number: int) -> None:
        region, start, size = self._spans[number]
        region.madvise(mmap.MADV_DONTNEED, start, size)

    def _place(self, like: Tensor) -> Tensor:
        size = -(-like.nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if not self._maps or self._used + size > len(self._maps[-1]):
            self._map(max(size, REGION))
        start, region = self._used, self._maps[-1]
        before = sum(map(len, self._maps[:-1]))
        # Without room a write to the map would end the process.
        with names_a_full_disk(self._folder):
            os.posix_fallocate(self._file, before + start, size)
        self._spans.append((region, start, size))
        self._used += size
        flat = torch.frombuffer(region, dtype=like.dtype, count=like.numel(), offset=start)
        return flat.view(like.shape)

    def _map(self, size: int) -> None:
        """Map the next region of the file, of which nothing is on the disk yet."""
        before = sum(map(len, self._maps))
        os.ftruncate(self._file, before + size)
        self._maps.append(mmap.mmap(self._file, size, offset=before))
        self._used = 0


HiddenStates = list[Tensor] | OffloadedHiddenStates
"""Hidden states of each batch; a list has them where blocks run."""


def store(states: HiddenStates, number: int, value: Tensor) -> None:
    """Replace the hidden states of a batch where they lie, if the new ones are as large.

    Others elsewhere, block after block, would leave holes between what stays.
    """
    here = states[number] if isinstance(states, list) else None
    if here is not None and (here.shape, here.dtype) == (value.shape, value.dtype):
        here.copy_(value)
    else:
        states[number] = value


def hidden_states_factory(
    where: Where, device: torch.device, folder: Path
) -> Callable[[], HiddenStates]:
    """Return what makes an empty place for hidden states; of files, in ``folder``."""
    if where == "disk":
        return lambda: MmapStates(device, folder)
    # On a CPU main memory is where blocks run.
    return (lambda: PinnedHostStates(device)) if where == "host" and device.type == "cuda" else list


def choose_offload(nbytes: int, device: torch.device) -> Where:
    """Return where so many bytes of hidden states take less than half of what is free."""
    if 2 * nbytes <= free(device):
        return "device"
    return "host" if device.type == "cuda" and 2 * nbytes <= free_host() else "disk"


def scratch(folder: Path) -> Path:
    """Return where a file without a name can be: in ``folder``, or where ``TMPDIR`` says."""
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
