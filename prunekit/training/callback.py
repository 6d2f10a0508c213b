"""Gradual pruning in the Trainer of transformers.

    trainer = Trainer(..., callbacks=[prunekit.PruneCallback(sparsity=0.8, end=1000, every=100)])

Shapes: N samples, T tokens.
"""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, NonNegativeInt, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from typing_extensions import TypedDict, override

from prunekit.errors import CheckpointError, ConfigError
from prunekit.models.in_memory import is_sharded
from prunekit.training.gradual import GradualPruner

FILE = "prunekit_pruner.safetensors"
"""File beside the Trainer's checkpoint with the masks."""
Sparsity = Annotated[float, Field(ge=0, le=1)]


class PruneCallback(TrainerCallback, ExportableState):
    """Prunes weights while a Trainer trains; takes the arguments of ``GradualPruner``.

    The masks are saved beside each checkpoint of the Trainer, and taken up when it resumes. Until
    the schedule is done no checkpoint counts as the best, so ``load_best_model_at_end`` and early
    stopping only compare models of the final sparsity.

    Attributes:
        pruner: The pruner, while the Trainer trains.
        checkpoint: Folder of the checkpoint to resume from; None for the one in ``output_dir``.
    """

    def __init__(self, *, checkpoint: str | None = None, **settings: Any) -> None:  # noqa: ANN401
        self.checkpoint, self.settings = checkpoint, settings
        self.pruner: GradualPruner | None = None
        self._was_done = False

    @override
    def state(self) -> dict[str, Any]:
        """Return the arguments as JSON, without tensors."""
        plain = {key: value for key, value in self.settings.items() if key != "tokens"}
        return {"args": plain, "attributes": {}}

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Begin, or continue from the file beside the checkpoint.

        Raises:
            ConfigError: A setting is invalid, or the end comes after the training.
            CheckpointError: Training resumes, and the file is missing or damaged.
        """
        end = self.settings.get("end")
        if isinstance(end, int) and 0 < state.max_steps < end:
            raise ConfigError(
                f"end: step {end} comes after the training, which has {state.max_steps} steps."
            )
        if is_sharded(parts["model"]):
            raise ConfigError(
                "PruneCallback: the weights are sharded over processes (FSDP), and a checkpoint "
                "of the Trainer would have the masks of one alone. Use DDP, or a GradualPruner in "
                "a loop of your own."
            )
        file = self._find(args, state) if state.global_step else None
        saved = read_state(file) if file else None
        settings = dict(self.settings)
        if saved and "tokens" in saved:
            settings.setdefault("tokens", saved.pop("tokens"))
        self.pruner = GradualPruner(parts["model"], parts["optimizer"], **settings)
        if saved:
            self.pruner.load_state_dict(saved)
        self._was_done = self.pruner.done

    @override
    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Forget the best metric of models that were not pruned as far."""
        assert self.pruner is not None
        if not self._was_done:
            state.best_metric = None
        self._was_done = self.pruner.done

    @override
    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Save the masks beside the checkpoint."""
        assert self.pruner is not None
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if folder.is_dir():  # not of a trial of a search, which does not resume
            write_state(self.pruner, folder / FILE)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Remove the hooks; the zeros remain."""
        assert self.pruner is not None
        self.pruner.remove()

    def _find(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Return the file of the checkpoint that the Trainer resumes from."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        asked = [self.checkpoint, args.resume_from_checkpoint]
        folders = [Path(each) for each in asked if isinstance(each, str)]
        folders = folders[:1] or [Path(str(args.output_dir), name)]
        if not (file := folders[0] / FILE).is_file():
            raise CheckpointError(
                f"{file}: there is no such file, so the masks of the checkpoint at step "
                f"{state.global_step} are unknown. If it is in another folder, pass "
                "PruneCallback(checkpoint=FOLDER)."
            )
        return file


class _State(TypedDict):
    """The numbers of a pruner's state."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # pyright: ignore

    step: NonNegativeInt
    started: bool
    settings: dict[str, Any]
    shares: dict[str, Sparsity]
    last: dict[str, Sparsity]


STATE = TypeAdapter(_State)


def write_state(pruner: GradualPruner, file: Path) -> None:
    """Write a pruner's state and samples to a safetensors file."""
    state = pruner.state_dict()
    tensors = {f"bits.{name}": bits for name, bits in state.pop("bits").items()}
    for number, batch in enumerate(pruner.batches or ()):
        tensors |= {f"tokens.{number}.{name}": value for name, value in batch.items()}
    save_file(tensors, file, {"state": json.dumps(state)})


def read_state(file: Path) -> dict[str, Any]:
    """Return the state and the samples in a file.

    Raises:
        CheckpointError: The file cannot be read, or :func:`write_state` has not written it.
    """
    bits: dict[str, Tensor] = {}
    batches: dict[int, dict[str, Tensor]] = {}
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        state = STATE.validate_json(metadata["state"])
        for path, tensor in load_file(file).items():
            kind, _, name = path.partition(".")
            if kind == "bits":
                bits[name] = tensor
            else:
                number, _, name = name.partition(".")
                batches.setdefault(int(number), {})[name] = tensor
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: not a file of a pruner ({error}).") from error
    tokens = [batches[number] for number in sorted(batches)]
    return {**state, "bits": bits} | ({"tokens": tokens} if tokens else {})
