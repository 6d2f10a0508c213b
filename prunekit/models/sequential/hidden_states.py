"""Storage of hidden states: device, main memory, or disk.

Reading always returns a tensor on the device that runs blocks, with the same bits.
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

from prunekit.checkpoint.atomic import report_full_disk
from prunekit.models.memory import free_bytes, free_host_bytes

Where = Literal["device", "host", "disk"]
REGION = 1 << 30
"""Bytes of a file in one memory map; each map holds a file descriptor, and these are few."""


class OffloadedHiddenStates:
    """Hidden states of batches, not on the device that runs blocks.

    Attributes:
        device: Device that runs blocks.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stored: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, number: int) -> Tensor:
        return self._stored[number].to(self.device, non_blocking=True, copy=True)

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
            self._stored[number].copy_(value, non_blocking=True)

    def extend(self, values: Iterable[Tensor]) -> None:
        """Append batches."""
        for value in values:
            self._stored.append(self._allocate(value))
            self[len(self) - 1] = value

    def _allocate(self, like: Tensor) -> Tensor:
        raise NotImplementedError


class PinnedHostStates(OffloadedHiddenStates):
    """Hidden states in pinned main memory, which a GPU copies asynchronously."""

    def _allocate(self, like: Tensor) -> Tensor:
        pinned = self.device.type == "cuda"
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)


class MmapStates(OffloadedHiddenStates):
    """Hidden states in a memory-mapped file without a name.

    The file is deleted when the process ends. Pages leave the process's memory as soon as they were
    read or written; the system's page cache holds as much of the file as fits.
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
        value = self._stored[number].to(self.device, copy=True)
        self._release(number)
        return value

    @overload
    def __setitem__(self, number: int, value: Tensor) -> None: ...
    @overload
    def __setitem__(self, number: slice, value: Iterable[Tensor]) -> None: ...
    def __setitem__(self, number: int | slice, value: Tensor | Iterable[Tensor]) -> None:
        super().__setitem__(number, value)  # pyright: ignore
        if isinstance(number, int):
            self._release(number)

    def _release(self, number: int) -> None:
        region, start, size = self._spans[number]
        region.madvise(mmap.MADV_DONTNEED, start, size)

    def _allocate(self, like: Tensor) -> Tensor:
        size = -(-like.nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if not self._maps or self._used + size > len(self._maps[-1]):
            self._map(max(size, REGION))
        start, region = self._used, self._maps[-1]
        before = sum(map(len, self._maps[:-1]))
        # A write to the map of a full disk would end the process.
        with report_full_disk(self._folder):
            os.posix_fallocate(self._file, before + start, size)
        self._spans.append((region, start, size))
        self._used += size
        flat = torch.frombuffer(region, dtype=like.dtype, count=like.numel(), offset=start)
        return flat.view(like.shape)

    def _map(self, size: int) -> None:
        """Map the next region of the file, without allocating disk blocks."""
        before = sum(map(len, self._maps))
        os.ftruncate(self._file, before + size)
        self._maps.append(mmap.mmap(self._file, size, offset=before))
        self._used = 0


HiddenStates = list[Tensor] | OffloadedHiddenStates
"""Hidden states of each batch; in a list they are on the device that runs blocks."""
HiddenStatesFactory = Callable[[], HiddenStates]
"""Makes empty storage for hidden states."""


def store(states: HiddenStates, number: int, value: Tensor) -> None:
    """Replace the hidden states of a batch, in place if possible.

    In place needs the same shape and dtype; new tensors for each block would fragment the memory.

    Args:
        states: Hidden states of all batches.
        number: Number of the batch.
        value: Its new hidden states.
    """
    here = states[number] if isinstance(states, list) else None
    if here is not None and (here.shape, here.dtype) == (value.shape, value.dtype):
        here.copy_(value)
    else:
        states[number] = value


def hidden_states_factory(where: Where, device: torch.device, folder: Path) -> HiddenStatesFactory:
    """Return a function that makes empty storage for hidden states.

    Args:
        where: Where they are stored.
        device: Device that runs blocks.
        folder: Folder of files on disk.
    """
    if where == "disk":
        return lambda: MmapStates(device, folder)
    # A CPU runs blocks in main memory.
    return (lambda: PinnedHostStates(device)) if where == "host" and device.type == "cuda" else list


def choose_offload(nbytes: int, device: torch.device) -> Where:
    """Return the nearest storage that ``nbytes`` fill less than half."""
    if 2 * nbytes <= free_bytes(device):
        return "device"
    return "host" if device.type == "cuda" and 2 * nbytes <= free_host_bytes() else "disk"


def scratch(folder: Path) -> Path:
    """Return a writable folder for temporary files: ``folder``, or that of ``TMPDIR``."""
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
