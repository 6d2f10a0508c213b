"""Weights of the next block, fetched in the background while one is pruned."""

from collections.abc import Collection
from contextlib import suppress
from threading import Event, Thread

import torch
from torch import Tensor

from prunekit.checkpoint.reader import Checkpoint
from prunekit.errors import CheckpointError


class Fetch(Thread):
    """Brings tensors of a checkpoint nearer.

    For a CPU files come into the system's cache, which takes none of the process's memory. For a
    GPU tensors are copied there, by way of pinned memory, on a stream of their own.
    """

    def __init__(
        self, checkpoint: Checkpoint, names: Collection[str], device: torch.device
    ) -> None:
        super().__init__(name="prunekit-fetch", daemon=True)
        self.checkpoint, self.names, self.device = checkpoint, set(names), device
        self._over = Event()
        self._error: Exception | None = None
        self._there: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self) -> None:
        """Fetch; what cannot be read, or has no room yet, is left to whoever needs it."""
        try:
            with suppress(CheckpointError, OSError, torch.OutOfMemoryError):
                self._fetch()
        except Exception as error:
            self._error = error

    def _fetch(self) -> None:
        if self._stream is None:
            self.checkpoint.warm(sorted(self.names), self._over)
            return
        with torch.cuda.stream(self._stream):
            self._there = {
                name: value.pin_memory().to(self.device, non_blocking=True)
                for name, value in self.checkpoint.read(self.names).items()
            }

    def take(self) -> dict[str, Tensor]:
        """Return the tensors that are on the device by now; on a CPU there are none.

        Raises:
            Exception: What else the thread met with.
        """
        if self._stream is None:
            self.cancel()
            self._raise()
            return {}
        self.join()
        self._raise()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for value in self._there.values():
            value.record_stream(current)
        there, self._there = self._there, {}
        return there

    def cancel(self) -> None:
        """Fetch no more."""
        self._over.set()

    def _raise(self) -> None:
        if self._error:
            raise self._error
