"""``[train]``: training of the pruned model, or pruning while training."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from prunekit.config.tables import MOST_STEPS, Listed, Section


class Adapter(Section):
    """LoRA adapter that is trained instead of the weights."""

    rank: int = Field(default=8, ge=1)
    """Rank of the two matrices of each adapted linear."""
    targets: Annotated[list[str], Listed, Field(min_length=1)] = Field(default=["all-linear"])
    """Linears to adapt: names or the last parts of names, such as "q_proj"; roles: query, key,
    value, output, gate, up, down; or "all-linear"."""


class Training(Section):
    """Keys of every training."""

    table: ClassVar[str] = "train"
    """Name of the table, for messages."""

    steps: int = Field(default=500, ge=1, le=MOST_STEPS)
    """Maximum number of steps."""
    rate: float = Field(default=5e-5, gt=0)
    """Peak learning rate of AdamW, after a warm-up and before a cosine decay."""
    batch: int = Field(default=4, ge=1)
    """Calibration samples per step."""
    held_out: int = Field(default=16, ge=1)
    """Number of calibration samples, from the end, to validate on instead of training on them; the
    weights with the lowest validation loss are kept."""
    every: int = Field(default=50, ge=1)
    """Steps between two validations."""
    patience: int = Field(default=5, ge=1)
    """Validations without an improvement after which training stops."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of batches."""
    save_every: int | None = Field(default=None, ge=0, le=MOST_STEPS)
    """Steps between two saves of the training's state in the output folder, from which --resume
    continues it; 0: none, so that a training that was stopped begins again. Default: with each
    validation, if saving takes at most a twentieth of the time."""
    sharded: bool | None = None
    """Shard weights, gradients and the optimizer's state over the processes (FSDP 2), so that each
    has a part. Default: only if the training fits into memory in no other way."""
    checkpoint_activations: bool = False
    """Store the input of each block alone, and run the block again for its gradient: less memory, a
    third more time."""
    log_with: Annotated[list[str], Listed] = Field(default=[])
    """Experiment trackers that the training is logged with, by their names in accelerate:
    tensorboard, wandb, mlflow, … Their packages have to be installed; files are written to the
    subfolder "trackers" of the output."""


class Train(Training):
    """Training of the pruned model on the calibration text, before writing it.

    Zeros remain zero. With the key end of [prune] the model is pruned during the training.
    """

    only: Annotated[list[Literal["routers", "norms", "biases", "head"]], Listed] = Field(default=[])
    """Train these parameters alone, and leave all others as they are: routers of mixtures of
    experts, norms, biases, head (all outside of the base model but output embeddings). Default:
    all."""
    adapter: Adapter | None = None
    """Train LoRA adapters alone, and merge them into the weights before they are written: a table
    of rank and targets. Needs peft. Default: all weights are trained where they fit into memory."""

    @field_validator("adapter")
    @classmethod
    def _check_alone(cls, adapter: Adapter | None, info: ValidationInfo) -> Adapter | None:
        if adapter and info.data.get("only"):
            raise ValueError("an adapter is trained alone; leave out only, or the adapter.")
        return adapter
