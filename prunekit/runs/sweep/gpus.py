"""Runs of a sweep side by side, one process a GPU."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import torch

from prunekit.errors import PrunekitError
from prunekit.runs.worker import Worker

VISIBLE = "CUDA_VISIBLE_DEVICES"
SECONDS = 1.0
"""After these the caller is asked whether to go on."""
Task = tuple[Callable[..., Iterator[Any]], tuple[object, ...]]
"""A generator function and its arguments, for a process of its own."""


def usable_gpus(device: torch.device) -> int:
    """Return the number of GPUs over which runs may be spread.

    Args:
        device: Device of the runs; one with an index is asked for by the user, and used alone.
    """
    if device.type != "cuda" or device.index is not None:
        return 1
    return max(1, torch.cuda.device_count())


def environment_of(place: int, places: int) -> dict[str, str]:
    """Return the variables of a process that has one of several GPUs.

    Args:
        place: Number of the GPU among those that this process sees.
        places: How many processes share the main memory and the processors.
    """
    names = [each for each in os.environ.get(VISIBLE, "").split(",") if each.strip()]
    name = names[place].strip() if place < len(names) else str(place)
    return {VISIBLE: name, "LOCAL_WORLD_SIZE": str(places)}


@dataclass
class _Slot:
    """A job on a GPU, with its remaining tasks."""

    name: str
    place: int
    left: deque[Task]
    worker: Worker
    item: Any = None


def run_side_by_side(
    jobs: Mapping[str, Sequence[Task]], gpus: int
) -> Iterator[tuple[str, int, Any] | None]:
    """Yield name, GPU, last item of each ended job, or None.

    None comes at least each second, so that the caller can stop.

    The tasks of a job follow each other on its GPU. Closing the generator ends all processes.

    Args:
        jobs: Tasks of each job, by its name.
        gpus: How many jobs run at a time, each on a GPU of its own.

    Raises:
        PrunekitError: A job failed, which the message names; the others are ended.
    """
    waiting, free, busy = deque(jobs.items()), deque(range(gpus)), list[_Slot]()
    try:
        while waiting or busy:
            while waiting and free:
                name, tasks = waiting.popleft()
                place, left = free.popleft(), deque(tasks)
                busy.append(_Slot(name, place, left, _start(left, place, gpus)))
            ready = wait([slot.worker.receiver for slot in busy], SECONDS)
            for slot in [each for each in busy if each.worker.receiver in ready]:
                if _advance(slot, gpus):
                    busy.remove(slot)
                    free.append(slot.place)
                    yield slot.name, slot.place, slot.item
            yield None
    finally:
        for slot in busy:
            slot.worker.close()


def _start(left: deque[Task], place: int, gpus: int) -> Worker:
    function, arguments = left.popleft()
    return Worker(function, *arguments, variables=environment_of(place, gpus))


def _advance(slot: _Slot, gpus: int) -> bool:
    """Receive an item of a job; return whether it has ended."""
    try:
        done, item = slot.worker.receive()
    except PrunekitError as error:
        raise type(error)(f"{slot.name}: {error}") from error
    if not done:
        slot.item = item
        return False
    slot.worker.close()
    if slot.left:
        slot.worker = _start(slot.left, slot.place, gpus)
        return False
    return True
