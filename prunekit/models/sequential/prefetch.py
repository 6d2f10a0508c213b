"""Prefetch the weights of the next block while one is pruned."""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from threading import Event, Thread

import torch
from torch import Tensor

from prunekit.checkpoint.reader import Checkpoint
from prunekit.errors import CheckpointError, is_out_of_memory


class Fetch(Thread):
    """A thread that prefetches tensors of a checkpoint.

    ``check`` refuses tensors that it copies, while they are still in main memory.
    For a CPU it warms the system's page cache, which takes none of the process's memory. For a GPU
    it copies tensors to the device, by way of pinned memory, on a stream of its own.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Collection[str],
        device: torch.device,
        check: Callable[[Mapping[str, Tensor]], None],
    ) -> None:
        super().__init__(name="prunekit-fetch", daemon=True)
        self.checkpoint, self.names, self.device = checkpoint, set(names), device
        self._check = check
        self._cancelled = Event()
        self._error: Exception | None = None
        self._fetched: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self) -> None:
        """Fetch the tensors; those that fail are read when needed."""
        try:
            with suppress(CheckpointError, OSError):
                self._fetch()
        except Exception as error:
            if not is_out_of_memory(error):
                self._error = error

    def _fetch(self) -> None:
        if self._stream is None:
            self.checkpoint.warm_page_cache(sorted(self.names), self._cancelled)
            return
        read = self.checkpoint.read(self.names)
        self._check(read)
        with torch.cuda.stream(self._stream):
            self._fetched = {
                name: value.pin_memory().to(self.device, non_blocking=True)
                for name, value in read.items()
            }

    def take(self) -> dict[str, Tensor]:
        """Wait for the tensors and return them; none for a CPU.

        Raises:
            Exception: Any error of the thread, except unreadable files and lack of memory.
        """
        if self._stream is None:
            self.cancel()
            self._raise()
            return {}
        self.join()
        self._raise()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for value in self._fetched.values():
            value.record_stream(current)
        fetched, self._fetched = self._fetched, {}
        return fetched

    def cancel(self) -> None:
        """Stop fetching."""
        self._cancelled.set()

    def _raise(self) -> None:
        if self._error:
            raise self._error
