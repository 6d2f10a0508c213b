"""Records of a run's training, and its state in the output folder.

The state is written to one of two files in turn, and the journal names the newest: one of them is
complete at any time. When the run has written its weights both are removed. If the weights are
sharded over processes, each process writes files of its own.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch

from prunekit.checkpoint.atomic import file_sha256
from prunekit.checkpoint.output import OutputFolder
from prunekit.config.train_table import Training
from prunekit.distributed.ranks import Ranks
from prunekit.errors import CheckpointError
from prunekit.structured.unit_gates import Gates
from prunekit.training.recover import TrainingStep
from prunekit.training.saved_state import State, read_state, write_state

STATES = "training-state-0.safetensors", "training-state-1.safetensors"
"""Files of the state, while the model is trained."""
ENTRY = "training", ""
"""Kind and name of the journal entry that names the file."""
SHARE = 0.05
"""Fraction of the time that saving may take by default."""


class Row(NamedTuple):
    """A recorded step with the mean gate factor of each kind."""

    step: TrainingStep
    factors: dict[str, float]

    def facts(self) -> dict[str, Any]:
        """Return the measured facts of the step."""
        step = self.step
        row = {
            "step": step.step,
            "loss": step.loss,
            "held_out": step.held_out,
            "rate": step.rate,
            "sparsity": step.sparsity,
            "achieved": step.achieved,
            "factors": self.factors or None,
            "distillation": dict(step.distillation) or None,
            **step.details,
        }
        optional = {"sparsity", "achieved", "factors", "distillation"}
        return {key: row[key] for key in row if row[key] is not None or key not in optional}

    def dump(self) -> dict[str, Any]:
        """Return the row as JSON, without the factors of single units."""
        return {"step": asdict(replace(self.step, factors={})), "factors": self.factors}

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> "Row":
        """Return the row that :meth:`dump` returned."""
        return cls(TrainingStep(**values["step"]), dict(values["factors"]))


class TrainingLog:
    """Log of the training of a run.

    Attributes:
        rows: The records so far.
        state: The state to continue from, until it is taken up; None to begin.
    """

    def __init__(
        self, output: OutputFolder, settings: Training | None, gates: Sequence[Gates] = ()
    ) -> None:
        """Read the state that a stopped run has left, if any.

        Args:
            output: The output folder, which the run has begun.
            settings: The training of the run's config.
            gates: Gates whose mean factors are recorded.
        """
        assert settings is not None
        self.rows: list[Row] = []
        self.state: State | None = None
        self._output, self._settings, self._gates = output, settings, gates
        self._names = state_files(output.ranks, sharded=settings.sharded)
        self._number = 0
        self._not_before = -float("inf")
        if values := output.journal.get(ENTRY):
            found = read_state(output.folder / self._own(values["files"]))
            self.state = found["state"]
            self.rows = [Row.load(each) for each in found["rows"]]

    def add(self, step: TrainingStep) -> None:
        """Store a record."""
        self.rows.append(Row(step, {each.kind: _mean_factor(each) for each in self._gates}))

    def save(self, step: int, state: Callable[[], State], *, is_measured: bool) -> None:
        """Save the state, if it is due.

        Args:
            step: Number of steps done.
            state: Returns the state.
            is_measured: The held-out loss was measured at this step.

        Raises:
            CapacityError: The file system refused a write.
        """
        every = self._settings.save_every
        due = is_measured if every is None else every > 0 and step % every == 0
        if due and step < self._settings.steps:
            self._save(step, state)

    def _save(self, step: int, state: Callable[[], State]) -> None:
        ranks, began = self._output.ranks, time.perf_counter()
        waits = self._settings.save_every is None
        if ranks.run_on_main(lambda: waits and began < self._not_before):
            return
        name = self._mine[self._number]
        if self._settings.sharded:
            digests = dict(ranks.all_gather_object((name, self._write(name, state))))
        else:
            digests = ranks.run_on_main(lambda: {name: self._write(name, state)})
        ranks.run_on_main(lambda: self._replace(step, digests))
        self._number = 1 - self._number
        ended = time.perf_counter()
        self._not_before = ended + (ended - began) / SHARE

    def _write(self, name: str, state: Callable[[], State]) -> str:
        """Write a file; return its digest."""
        file, rows = self._output.folder / name, [row.dump() for row in self.rows]
        write_state(file, {"state": state(), "rows": rows})
        return file_sha256(file)

    def _replace(self, step: int, digests: dict[str, str]) -> None:
        """Make files the state to continue from, and remove those before."""
        self._output.append_journal(*ENTRY, {"step": step, "files": digests})
        for each in self._names:
            (self._output.folder / each[1 - self._number]).unlink(missing_ok=True)

    def _own(self, names: Iterable[str]) -> str:
        """Return the file of this rank, and continue with the other one.

        Raises:
            CheckpointError: The state is that of another number of processes.
        """
        for number in (0, 1):
            if {*names} == {each[number] for each in self._names}:
                self._number = 1 - number
                return self._mine[number]
        raise CheckpointError(
            f"{self._output.folder}: the state of its training is in {len([*names])} files, one of "
            "each process if weights were sharded. Continue it with as many processes, or start "
            "again with --overwrite."
        )

    @property
    def _mine(self) -> tuple[str, str]:
        """The two files with the state of this rank."""
        return self._names[self._output.ranks.rank if self._settings.sharded else 0]


def state_files(ranks: Ranks, *, sharded: bool | None) -> list[tuple[str, str]]:
    """Return the two names of each file of a state.

    Args:
        ranks: The processes that train.
        sharded: Each has a file with its parts of the weights.
    """
    if not sharded:
        return [STATES]
    return [
        (f"training-state-0.{part}.safetensors", f"training-state-1.{part}.safetensors")
        for part in (f"{rank}-of-{ranks.size}" for rank in range(ranks.size))
    ]


def discard_state(output: OutputFolder) -> None:
    """Remove the state of a training, as its result is written."""
    output.journal.pop(ENTRY, None)

    def remove() -> None:
        for file in output.folder.glob("training-state-*.safetensors"):
            file.unlink()

    output.ranks.run_on_main(remove)


def _mean_factor(gates: Gates) -> float:
    factors = [gate.factor.detach().flatten() for gate in gates.gates.values()]
    return float(torch.cat(factors).mean())
