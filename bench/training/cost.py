"""Time of a step and memory of the masks, beside plain training."""

import statistics
import time
from contextlib import ExitStack
from typing import Any

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

TIMED = ("by hand, cubic", "torch.nn.utils.prune, cubic", "GradualPruner, cubic")
DENSE = "plain training"


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
    with ExitStack() as stack:
        training = {}
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
                    began = time.perf_counter()
                    train_step(model, optimizer, batch)
                    after_step()
                    seconds[name].append(time.perf_counter() - began)
    return [
        {
            "contestant": name,
            "milliseconds": 1000 * statistics.mean(each[1:]),
            "while_pruning": _ratio(each[1 : ask.end], seconds[DENSE][1 : ask.end]),
            "afterwards": _ratio(each[ask.end :], seconds[DENSE][ask.end :]),
            "mask_bits": mask_bits(found, contestants[name], sparsity),
        }
        for name, each in seconds.items()
    ]


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
