"""State of a training, and the log that stores it.

A state is a tree of tables and lists with numbers, texts and tensors at its ends. If the weights
are sharded over processes, each has a state of its own, with its parts.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prunekit.checkpoint.safetensors_writer import write_shard
from prunekit.errors import CheckpointError, ConfigError
from prunekit.models.in_memory import local_part, sharded_like

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from prunekit.training.measure import Measure, TrainingStep

State = Mapping[str, Any]
TREE, TENSOR = "tree", "tensor"
"""Entry of a file with the tree as JSON, and key of a table in it that names a tensor."""


class TrainingLog(Protocol):
    """Where a training's records and its state are stored.

    Attributes:
        state: The state to continue from; None to begin. Once it is taken up, it is set to None.
    """

    state: State | None

    def add(self, step: "TrainingStep") -> None:
        """Store a record."""
        ...

    def save(self, step: int, state: Callable[[], State], *, is_measured: bool) -> None:
        """Store the state after a step, if one is due.

        Args:
            step: Number of steps done.
            state: Returns the state.
            is_measured: The held-out loss was measured at this step.
        """
        ...


class Unlogged:
    """A log that stores nothing."""

    state: State | None = None

    def add(self, step: "TrainingStep") -> None:
        """Do nothing."""

    def save(self, step: int, state: Callable[[], State], *, is_measured: bool) -> None:
        """Do nothing."""


def training_state(optimizer: "Optimizer", measure: "Measure", step: int) -> State:
    """Return all that a training has changed.

    Args:
        optimizer: The optimizer.
        measure: The measurement, which knows the model and what is in force.
        step: Number of steps done.
    """
    pruning, distiller = measure.pruning, measure.distiller
    optimized = optimizer.state_dict()["state"]
    return {
        "step": step,
        "weights": {name: each.detach() for name, each in measure.changed_weights().items()},
        "optimizer": {str(number): values for number, values in optimized.items()},
        "best": measure.best.state_dict(),
        "pruning": pruning.state_dict() if pruning else None,
        "distiller": distiller.state_dict() if distiller else None,
    }


@torch.no_grad()
def restore_training(optimizer: "Optimizer", measure: "Measure", state: State) -> int:
    """Set a training to a state; return the number of steps done.

    Args:
        optimizer: The optimizer of the training.
        measure: Its measurement; the model has the shapes of the state.
        state: As :func:`training_state` returned it.

    Raises:
        ConfigError: It is of another training.
    """
    weights = measure.changed_weights()
    if differ := sorted(weights.keys() ^ state["weights"].keys()):
        raise ConfigError(f"state: it is of another training; {differ[0]} is in one only.")
    for name, weight in weights.items():
        local_part(weight).copy_(state["weights"][name])
    groups = optimizer.state_dict()["param_groups"]
    trained = [each for group in optimizer.param_groups for each in group["params"]]
    values = {
        int(number): _sharded(each, trained[int(number)])
        for number, each in state["optimizer"].items()
    }
    optimizer.load_state_dict({"state": values, "param_groups": groups})
    measure.best.load_state_dict(state["best"])
    if measure.pruning:
        measure.pruning.load_state_dict(state["pruning"])
    if measure.distiller:
        measure.distiller.load_state_dict(state["distiller"])
    return state["step"]


def _sharded(values: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Return the state of a parameter, sharded as it is."""
    shape = local_part(parameter).shape
    return {
        key: sharded_like(value.to(parameter.device), parameter)
        if isinstance(value, Tensor) and value.ndim and value.shape == shape
        else value
        for key, value in values.items()
    }


def write_state(file: Path, state: State) -> None:
    """Write a state to a safetensors file, atomically.

    Raises:
        CapacityError: The file system refused a write.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_without_tensors(state, "", tensors)).encode()
    tensors[TREE] = torch.frombuffer(bytearray(tree), dtype=torch.uint8)
    write_shard(file, tensors)


def read_state(file: Path) -> State:
    """Return the state in a file.

    Raises:
        CheckpointError: The file cannot be read, or holds no state.
    """
    try:
        tensors = load_file(file)
        tree = json.loads(tensors.pop(TREE).numpy().tobytes())
        return _with_tensors(tree, tensors)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: not the state of a training ({error}).") from error


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401
    """Return a tree with names in place of its tensors."""
    if isinstance(value, Tensor):
        tensors[path] = local_part(value.detach()).cpu()
        return {TENSOR: path}
    if isinstance(value, Mapping):
        return {
            key: _without_tensors(part, f"{path}/{key}", tensors) for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without_tensors(part, f"{path}/{n}", tensors) for n, part in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    """Return a tree with its tensors again."""
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: _with_tensors(part, tensors) for key, part in value.items()}
    return [_with_tensors(part, tensors) for part in value] if isinstance(value, list) else value
