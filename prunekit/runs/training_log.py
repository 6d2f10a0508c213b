"""Records of a run's training, and its state in the output folder.

The state is written to one of two files in turn, and the journal names the newest: one of them is
complete at any time. When the run has written its weights both are removed.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch

from prunekit.checkpoint.atomic import file_sha256
from prunekit.checkpoint.output import OutputFolder
from prunekit.config.train_table import Training
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
        self._number = 0
        self._not_before = -float("inf")
        if values := output.journal.get(ENTRY):
            (name,) = values["files"]
            found = read_state(output.folder / name)
            self.state = found["state"]
            self.rows = [Row.load(each) for each in found["rows"]]
            self._number = 1 - STATES.index(name)

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
            self._output.ranks.run_on_main(lambda: self._save(step, state))

    def _save(self, step: int, state: Callable[[], State]) -> None:
        began = time.perf_counter()
        if self._settings.save_every is None and began < self._not_before:
            return
        name, other = STATES[self._number], STATES[1 - self._number]
        rows = [row.dump() for row in self.rows]
        write_state(self._output.folder / name, {"state": state(), "rows": rows})
        digest = file_sha256(self._output.folder / name)
        self._output.append_journal(*ENTRY, {"step": step, "files": {name: digest}})
        (self._output.folder / other).unlink(missing_ok=True)
        self._number = 1 - self._number
        ended = time.perf_counter()
        self._not_before = ended + (ended - began) / SHARE


def discard_state(output: OutputFolder) -> None:
    """Remove the state of a training, as its result is written."""
    output.journal.pop(ENTRY, None)

    def remove() -> None:
        for name in STATES:
            (output.folder / name).unlink(missing_ok=True)

    output.ranks.run_on_main(remove)


def _mean_factor(gates: Gates) -> float:
    factors = [gate.factor.detach().flatten() for gate in gates.gates.values()]
    return float(torch.cat(factors).mean())
