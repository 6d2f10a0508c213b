"""Values that a device still computes, while the host goes on.

Reading a number of a GPU (``item``, ``bool``, ``tolist``, ``cpu``) stops the host until the GPU has
done all that was asked of it, and then the GPU waits for the host. A value that only a record needs
is copied to pinned memory in the order of the stream, and read once it is there; one that decides
what is done next is read after work that does not depend on it has been asked for.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

REMOTE = frozenset({"cuda"})
"""Types of devices that work while the host goes on."""
Moment = float | torch.cuda.Event
"""A moment in the work of a device: by the host's clock, or an event."""
Span = tuple[float, Moment, Moment]
"""Weight, begin and end of a time."""


class Pending:
    """A value that is there once a device has passed an event.

    Args:
        event: The event.
        read: Returns the value, after the event.
    """

    def __init__(self, event: torch.cuda.Event, read: Callable[[], Any]) -> None:
        self._event, self._read = event, read

    @property
    def is_there(self) -> bool:
        """Whether the value can be read without waiting."""
        return self._event.query()

    def wait(self) -> Any:
        """Wait for the value and return it."""
        self._event.synchronize()
        return self._read()


def is_remote(device: torch.device) -> bool:
    """Return whether the host would wait for the values of a device."""
    return device.type in REMOTE


def to_host(tensor: Tensor, then: Callable[[Tensor], Any] = Tensor.tolist) -> Any:
    """Return the value of a tensor; of a GPU :class:`Pending`.

    Args:
        tensor: The tensor. On a GPU, what is done to it afterwards does not change the value.
        then: Makes the value of the tensor on the host; by default a number, or a list of them.
    """
    if not is_remote(tensor.device):
        return then(tensor.cpu())
    host = _pinned(tensor)
    host.copy_(tensor, non_blocking=True)
    return Pending(_event(tensor.device), lambda: then(host))


def value_of(value: Any) -> Any:
    """Return a value, waiting for it if it is pending."""
    return value.wait() if isinstance(value, Pending) else value


def now(device: torch.device) -> Moment:
    """Return this moment in the work of a device, for :func:`weighted_seconds`."""
    return _event(device) if is_remote(device) else time.perf_counter()


def weighted_seconds(*spans: Span) -> Any:
    """Return the summed seconds of spans of one device, in order."""
    last = spans[-1][2]

    def total() -> float:
        return sum(weight * _seconds(began, ended) for weight, began, ended in spans)

    return total() if isinstance(last, float) else Pending(last, total)


def _seconds(began: Moment, ended: Moment) -> float:
    if isinstance(began, int | float):
        assert isinstance(ended, int | float)
        return ended - began
    return began.elapsed_time(ended) / 1000


def _pinned(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def _event(device: torch.device) -> torch.cuda.Event:
    # Whoever waits leaves its processor to others.
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event
