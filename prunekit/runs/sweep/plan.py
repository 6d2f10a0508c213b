"""Plan of a sweep: the plans of all its runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prunekit.config.run_config import Config, StructuredConfig, SweepConfig
from prunekit.config.sweep_table import removed_fraction, series_label
from prunekit.errors import ConfigError, PrunekitError
from prunekit.formatting import percent, size
from prunekit.runs.checks import check_disk, check_output_path
from prunekit.runs.plan_base import fact_table, note_lines
from prunekit.runs.sparsify.plan import Plan
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.sweep.gpus import usable_gpus
from prunekit.runs.trained.plan import TrainedPlan

RunPlan = Plan | StructuredPlan | TrainedPlan
PlanOne = Callable[[Config | StructuredConfig], RunPlan]


@dataclass(frozen=True, repr=False)
class SweepPlan:
    """Plan of a sweep; made by :func:`plan`.

    Attributes:
        config: The user's config.
        runs: The plan of each run, by its name.
    """

    config: SweepConfig
    runs: Mapping[str, RunPlan]

    def __repr__(self) -> str:
        return f"<SweepPlan: {len(self.runs)} runs of {self.config.model.path} to {self.folder}>"

    @property
    def first(self) -> RunPlan:
        """Plan of the first run; all runs have the same model."""
        return next(iter(self.runs.values()))

    @property
    def gpus(self) -> int:
        """Number of GPUs over which the runs are spread, one process each."""
        return usable_gpus(self.first.device)

    @property
    def folder(self) -> Path:
        """Output folder of the comparison."""
        return Path(self.config.output.path)

    def series(self, name: str) -> str:
        """Return the label of a run's line in figures."""
        return series_label(self.runs[name].config.prune.model_dump(), self.config.keys[name])

    def describe(self) -> RenderableType:
        """Return the plan as a table to print."""
        spread = f", {self.gpus} at a time, a GPU each" if self.gpus > 1 else ""
        table = Table(title=f"{len(self.runs)} runs, each in a process of its own{spread}")
        for header in ("folder", "what", "goes"):
            table.add_column(header)
        for name, run in self.runs.items():
            removed = percent(removed_fraction(run.config.prune))
            table.add_row(Text(f"runs/{name}"), Text(self.series(name)), removed)
        notes = dict.fromkeys(note for run in self.runs.values() for note in run.notes)
        kept = "kept" if self.config.sweep.keep else "removed once they are measured"
        facts = {
            "model": self.first.config.model.path,
            "output": f"{self.folder}  (models are {kept}, "
            f"{size(self.first.checkpoint.nbytes)} each at most)",
            "writes": f"{self.config.sweep.tokens} tokens to each prompt",
        }
        return Group(fact_table(facts), "", table, *note_lines(notes))


def plan(config: SweepConfig, plan_one: PlanOne) -> SweepPlan:
    """Plan every run.

    Args:
        config: The user's config.
        plan_one: Plans one run.

    Raises:
        ConfigError: Some runs cannot work; each mistake is named once, with its runs.
        CapacityError: The disk cannot hold the models.
    """
    runs: dict[str, RunPlan] = {}
    mistakes: dict[str, list[str]] = {}
    for name in config.runs:
        try:
            runs[name] = plan_one(config.standalone(name))
        except PrunekitError as error:
            mistakes.setdefault(str(error), []).append(name)
    if mistakes:
        raise ConfigError(
            "\n".join(f"{_abbreviated(names)}: {message}" for message, names in mistakes.items())
        )
    made = SweepPlan(config, runs)
    check_output_path(config.first, made.first.checkpoint)
    copies = len(runs) if config.sweep.keep else min(made.gpus, len(runs))
    check_disk(
        config.output.path,
        copies * made.first.checkpoint.nbytes,
        made.first.joining,
        made.first.least_joining,
    )
    return made


def _abbreviated(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
