"""Load tasks of lm-evaluation-harness with their data sets."""

import hashlib
import importlib.metadata
import json
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from prunekit.data.sources import TASK_FILES, missing_package, title
from prunekit.errors import ConfigError, is_out_of_memory
from prunekit.formatting import did_you_mean
from prunekit.models import stock

SEED = 1234
"""Seed of the harness, for the choice of examples."""
NOISY = ("lm_eval", "datasets", "huggingface_hub")
"""Loggers that would write to the terminal."""


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks of the harness, and how they are asked.

    Attributes:
        names: Names of tasks, groups or tags, or paths of task files.
        few_shot: Solved examples before each question; None for those of the task.
        limit: Documents of each task, from its start; None for all.
    """

    names: tuple[str, ...]
    few_shot: int | None = None
    limit: int | None = None


def missing_harness() -> str | None:
    """Return how to install the harness, or None where it is there."""
    return missing_package("evaluate.tasks", "lm_eval", "harness")


@cache
def load_tasks(tasks: HarnessTasks) -> dict[str, Any]:
    """Load tasks with their data sets; build each one's first request.

    Data sets of the hub are downloaded once, to the cache of Hugging Face.

    Returns:
        ``tasks``, ``groups`` and ``group_map`` of the harness.

    Raises:
        ConfigError: The harness is not installed; a task is not known, its data cannot be read or
            do not fit its file, or it needs images or runs code that a model wrote.
    """
    if problem := missing_harness():
        raise ConfigError(f"{problem}.")
    with quiet(), seeded():
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]  an extra

        local = all(name.endswith(TASK_FILES) for name in tasks.names)
        manager = TaskManager(include_defaults=not local)  # to find all names takes seconds
        found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in tasks.names:
            with _explained(name, manager):
                loaded = manager.load([name])
                for one in loaded["tasks"].values():
                    _prepare(one, tasks)
            for kind, entries in loaded.items():
                found[kind] |= entries
    return found


def digest(tasks: HarnessTasks) -> str:
    """Return the SHA-256 of all questions and settings of tasks."""
    found = hashlib.sha256(version().encode())
    for name, task in load_tasks(tasks)["tasks"].items():
        found.update(json.dumps([name, task.dump_config()], default=str, sort_keys=True).encode())
        for document in task.eval_docs:
            found.update(repr(document).encode(errors="backslashreplace"))
    return found.hexdigest()


def _prepare(task: Any, tasks: HarnessTasks) -> None:  # noqa: ANN401  a class of the harness
    """Set the examples of a task, and build its first request.

    Raises:
        ValueError: It cannot be run here.
    """
    if getattr(task, "MULTIMODAL", False):
        raise ValueError("it asks about images, which are not shown to the model")
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError("it runs code that the model writes, which is never done")
    fixed = task.get_config("num_fewshot")
    if tasks.few_shot and fixed == 0:
        raise ValueError("it is defined without examples; leave out evaluate.few_shot")
    if tasks.few_shot is not None:
        task.set_config(key="num_fewshot", value=tasks.few_shot)
    elif fixed is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEED)
    task.build_all_requests(limit=1, rank=0, world_size=1)


@contextmanager
def _explained(name: str, manager: Any) -> Iterator[None]:  # noqa: ANN401
    """Turn errors of a task into errors that name it."""
    try:
        yield
    except Exception as error:  # task files, templates and data sets raise any
        if is_out_of_memory(error):
            raise
        where = f"evaluate.tasks: {title(name) if name.endswith(TASK_FILES) else name}"
        if isinstance(error, KeyError) and name not in manager.all_tasks and "Spec" in str(error):
            raise ConfigError(
                f"{where}: lm-eval {version()} has no such task."
                f"{did_you_mean(name, manager.all_tasks)} lm-eval ls tasks lists them; a task file "
                "of your own ends in .yaml."
            ) from error
        advice = "Mend the task file, or choose another task."
        if isinstance(error, OSError):
            advice = (
                "Its data set is read from the Hugging Face hub or its cache (HF_HOME): download "
                "it where there is a network, or name a task file (.yaml) over a local data set."
            )
        raise ConfigError(f"{where}: {stock.describe(error)}. {advice}") from error


@cache
def version() -> str:
    """Return the version of the installed harness."""
    return importlib.metadata.version("lm_eval")


@contextmanager
def seeded() -> Iterator[None]:
    """Seed the generators that tasks draw from, and restore them."""
    state = random.getstate()
    random.seed(SEED)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            yield
    finally:
        random.setstate(state)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness from writing to the terminal."""
    import datasets  # pyright: ignore[reportMissingImports]  an extra
    from lm_eval.api import model, task  # pyright: ignore[reportMissingImports]  an extra
    from lm_eval.models import huggingface  # pyright: ignore[reportMissingImports]  an extra
    from tqdm import tqdm

    levels = {name: logging.getLogger(name).level for name in NOISY}
    shown = datasets.are_progress_bars_disabled()
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    modules: list[Any] = [model, task, huggingface]
    for module in modules:
        module.tqdm = lambda *given, **named: tqdm(*given, **{**named, "disable": True})
    try:
        yield
    finally:
        for module in modules:
            module.tqdm = tqdm
        if not shown:
            datasets.enable_progress_bars()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
