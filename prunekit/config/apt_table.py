"""``[apt]``: adapters that prune and grow while they are trained."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from prunekit.config.tables import MOST_STEPS, Listed
from prunekit.config.train_table import Training
from prunekit.models.units.kinds import Counted


class Apt(Training):
    """Training of adapters that prune the model and grow (APT).

    After a warm-up come windows. At the start of each the units with the highest salience per
    parameter are chosen within a cubic budget; in it the gates of the others close step by step; at
    its end these units are removed and the most important adapters grow.
    """

    table: ClassVar[str] = "apt"

    parameters: float = Field(gt=0, lt=1)
    """Largest fraction of the parameters to keep."""
    parameters_of: Counted = "blocks"
    """Parameters that are counted: those of the whole model, or those of its blocks, embeddings and
    head left out, as the authors count."""
    kinds: Annotated[list[Literal["hidden", "heads", "neurons"]], Listed, Field(min_length=1)] = (
        Field(default=["heads", "neurons"])
    )
    """Kinds of units to remove; hidden (dimensions of the residual stream) only of models with
    RMSNorm."""
    rank: int = Field(default=8, ge=1)
    """Rank of the adapters at first."""
    most_rank: int = Field(default=64, ge=1)
    """Largest rank of an adapter."""
    scale: float = Field(default=2.0, gt=0)
    """Factor of the adapters' product; it does not depend on the rank, so that growth changes no
    output."""
    targets: Annotated[list[str], Listed, Field(min_length=1)] | None = None
    """Linears to adapt, as in train.adapter. Default: query and value, of encoders and
    encoder-decoders up too."""
    also: Annotated[list[Literal["norms", "biases", "head"]], Listed] = Field(default=[])
    """What is trained beside the adapters: weights of norms, biases, the head of a classifier."""
    warmup: int = Field(default=200, ge=1, le=MOST_STEPS)
    """Steps of training before the first window."""
    window: int = Field(default=100, ge=1, le=MOST_STEPS)
    """Steps of a window."""
    windows: int = Field(default=10, ge=1, le=MOST_STEPS)
    """Number of windows, after which the budget is met."""
    decay: float = Field(default=0.01, gt=0, le=1)
    """Amount by which gates of units to remove fall at each step, and others rise."""
    ema: float = Field(default=0.85, ge=0, lt=1)
    """Share of the earlier salience in the running mean of each step."""
    outliers: bool = True
    """Add the root of the kurtosis of weights to the salience."""
    growth: float = Field(default=4.0, ge=1)
    """Parameters of the adapters at the end, as a multiple of those at first; 1: no growth."""
    uniform: bool = False
    """Keep equally many heads and neurons in every layer, so that a standard config.json can
    describe the model, as in [prune]."""
    least: int = Field(default=1, ge=0)
    """Fewest units that every layer keeps; with 0 whole attentions and feed-forwards may be taken
    out, as in [prune]."""
    round_to: int = Field(default=1, ge=1)
    """Round every kept width up to a multiple of this, as in [prune]."""
    steps: int = Field(default=2000, ge=1, le=MOST_STEPS)
    """Maximum number of steps; those after the last window restore what pruning cost."""
    rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate of AdamW, after a warm-up and before a cosine decay."""
    batch: int = Field(default=32, ge=1)
    """Calibration samples per step."""
    patience: int = Field(default=20, ge=1)
    """Validations without an improvement, after the last window, after which training stops."""

    @property
    def end(self) -> int:
        """The step at which the last window ends."""
        return self.warmup + self.windows * self.window

    def budget(self, window: int) -> float:
        """Return the fraction of parameters kept at a window's end.

        ``γ = γ_T + (1 − γ_T) (1 − t)³`` with t = window / windows.
        """
        left = 1 - window / self.windows
        return self.parameters + (1 - self.parameters) * left**3

    def as_prune(self) -> dict[str, Any]:
        """Return the table [prune] with the same units and budget."""
        return {
            "method": "salience",
            "smoothing": self.ema,
            "outliers": self.outliers,
            "pattern": [*self.kinds],
            "parameters": self.parameters,
            "parameters_of": self.parameters_of,
            "uniform": self.uniform,
            "least": self.least,
            "round_to": self.round_to,
            "compensate": "none",
        }

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.end > self.steps:
            raise ValueError(
                f"the last window ends at step {self.end} (warmup {self.warmup} and {self.windows} "
                f"windows of {self.window}), beyond the training: steps = {self.steps}."
            )
        if self.rank > self.most_rank:
            raise ValueError(f"rank {self.rank} is above most_rank = {self.most_rank}.")
        return self
