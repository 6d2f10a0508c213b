"""Peak memory that PyTorch allocates during a call."""

import gc

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work) -> int:
    """Return the peak bytes of tensors that ``work`` allocates.

    Garbage is collected often, as in a process of its own: the interpreter leaves tensors in it.
    """
    usual = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    try:
        return _peak_bytes(work)
    finally:
        gc.set_threshold(*usual)


def _peak_bytes(work) -> int:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=True) as profiler:
        result = work()
    events = profiler.profiler.kineto_results.events()  # pyright: ignore
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        most = max(most, held)
    assert most, f"nothing was recorded for {result}"
    return most
