"""Time of a step and memory of the masks, beside plain training."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from bench.training.contestants import CONTESTANTS, dense
from bench.training.task import (
    BATCH,
    EVERY,
    Ask,
    Attach,
    Task,
    held_bytes,
    new_optimizer,
    train_step,
    weights,
)
from prunekit import GradualPruner
from prunekit.training.after_backward import AfterBackward
from prunekit.training.masks import Masks

OWN = (
    (Masks, "_gradient_hook"),
    (AfterBackward, "flush"),
    (Masks, "apply"),
    (GradualPruner, "_before_step"),
    (GradualPruner, "_after_step"),
)
"""What runs in a step because of our pruner."""
TIMED = ("by hand, cubic", "torch.nn.utils.prune, cubic", "GradualPruner, cubic")
DENSE = "plain training"
OURS = "GradualPruner, cubic"


def cost(found: Task, sparsity: float, steps: int) -> list[dict[str, Any]]:
    """Return seconds per step relative to plain training, and bits of masks per weight.

    All train in one process, ``EVERY`` steps each in turn, on the same batches. The schedule ends
    after half of the steps. The machine has to be idle.

    Args:
        found: The model and its text.
        sparsity: Sparsity at the end of the schedule.
        steps: Steps of training of each.
    """
    contestants: dict[str, Attach] = {DENSE: dense} | {name: CONTESTANTS[name] for name in TIMED}
    ask = Ask(sparsity, end=steps // 2)
    parts = found.samples(steps * BATCH, seed=0).split(BATCH)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    own: list[float] = []
    with ExitStack() as stack:
        training, spent = {}, stack.enter_context(_own_seconds())
        for name, attach in contestants.items():
            model = found.load()
            optimizer = new_optimizer(model)
            training[name] = model, optimizer, stack.enter_context(attach(model, optimizer, ask))
        names = [*contestants]
        for number in range(0, steps, EVERY):
            # Each is the first of a round equally often.
            first = number // EVERY % len(names)
            for name in names[first:] + names[:first]:
                model, optimizer, after_step = training[name]
                for batch in parts[number : number + EVERY]:
                    began, before = time.perf_counter(), spent[0]
                    train_step(model, optimizer, batch)
                    after_step()
                    seconds[name].append(time.perf_counter() - began)
                    if name == OURS:
                        own.append(spent[0] - before)
    return [
        {
            "contestant": name,
            "milliseconds": 1000 * statistics.mean(each[1:]),
            "whole": sum(each[1:]) / sum(seconds[DENSE][1:]),
            "while_pruning": _ratio(each[1 : ask.end], seconds[DENSE][1 : ask.end]),
            "afterwards": _ratio(each[ask.end :], seconds[DENSE][ask.end :]),
            "mask_bits": mask_bits(found, contestants[name], sparsity),
        }
        | (_shares(own, each, ask.end) if name == OURS else {})
        for name, each in seconds.items()
    ]


@contextmanager
def _own_seconds() -> Iterator[list[float]]:
    """Sum up the time of our pruner's own code, in a list of one number."""
    spent, depth = [0.0], [0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:  # noqa: ANN401
            began, outermost = time.perf_counter(), not depth[0]
            depth[0] += 1
            try:
                return call(*args, **options)
            finally:
                depth[0] -= 1
                spent[0] += (time.perf_counter() - began) * outermost

        return run

    with ExitStack() as stack:
        for owner, name in OWN:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        yield spent


def _shares(own: list[float], whole: list[float], end: int) -> dict[str, float]:
    """Return the time of a step over that without our own code."""
    parts = {
        "own_while_pruning": slice(1, end),
        "own_afterwards": slice(end, None),
        "own": slice(1, None),
    }
    return {
        name: sum(whole[part]) / (sum(whole[part]) - sum(own[part])) for name, part in parts.items()
    }


def _ratio(times: list[float], plain: list[float]) -> float:
    """Return the median, over spans of ``EVERY`` steps, of the time over that of plain training.

    Each span has one pruning while the schedule lasts. The median leaves out disturbances.
    """
    spans = [slice(start, start + EVERY) for start in range(0, len(times), EVERY)]
    return statistics.median(sum(times[span]) / sum(plain[span]) for span in spans)


def mask_bits(found: Task, attach: Attach, sparsity: float) -> float:
    """Return the bits that pruning holds in memory, per weight of the linears."""
    ask = Ask(sparsity, end=2, every=1)
    model = found.load()
    optimizer = new_optimizer(model)
    batch = found.samples(BATCH, seed=0)
    train_step(model, optimizer, batch)  # creates the optimizer's state
    before = held_bytes()
    with attach(model, optimizer, ask) as after_step:
        for _ in range(ask.end):
            train_step(model, optimizer, batch)
            after_step()
        # torch's masks hold the graph of the last forward until the next one.
        train_step(model, optimizer, batch)
        return 8 * (held_bytes() - before) / sum(weight.numel() for weight in weights(model))
