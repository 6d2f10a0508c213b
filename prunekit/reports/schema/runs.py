"""Reports of single runs."""

from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, JsonValue, model_validator

from prunekit.models.units.kinds import Kind
from prunekit.reports.schema.values import (
    Answer,
    Count,
    FileName,
    Fraction,
    Matrix,
    Number,
    Pair,
    Part,
    PatternName,
    Text,
    check_unique,
    is_square,
)


class Model(Part):
    """The model that was pruned."""

    path: str | None = None
    architecture: str | None = None
    parameters: Count | None = None
    prunable_parameters: Count | None = None
    blocks: Count | None = None


class Calibration(Part):
    """The tokens that the model was calibrated on."""

    description: str
    samples: Count
    length: Count
    tokens: Count
    gathers: list[str] | None = None


class Evaluation(Part):
    """A measure before and after."""

    data: str
    metric: Text
    protocol: str
    before: Number | None = None
    after: Number | None = None
    samples: Count | None = None
    correct: dict[str, Count] | None = None
    stderr: dict[str, Number] | None = None
    harness: dict[str, JsonValue] | None = None


class Proof(Part):
    """Outputs of the written model for fixed tokens."""

    ids: Annotated[list[list[Count]], Field(min_length=1, max_length=1)]
    dtype: Literal["float64", "float32", "bfloat16", "float16"]
    device: Literal["cpu", "cuda"]
    answers: list[Answer]


class Gate(Part):
    """A limit of the config, and what was reached."""

    name: Text
    asked: Number
    achieved: Number
    met: bool
    where: str


class Quantized(Part):
    """How weights were rounded, and what became of the zeros before."""

    scheme: Text
    group: Count | None = None
    words: Text
    zeros_before: Count
    refilled: Count


class Storage(Part):
    """Format and size of the files."""

    bytes: Count
    bytes_before: Count
    compressed: Count | None = None
    dense: Count | None = None
    quantized: Quantized | None = None


class Config(Part):
    """The config of the run; it may lack [prune]."""

    prune: dict[str, JsonValue] | None = None


class Report(Part):
    """The entries that reports of all kinds have."""

    prunekit: Text
    model: Model
    config: Config = Config()
    environment: dict[str, JsonValue] | None = None


class Run(Report):
    """The entries that all reports of single runs have."""

    calibration: Calibration | None = None
    evaluation: list[Evaluation] | None = None
    seconds: dict[str, Number | None] | None = None
    memory: dict[str, Count | None] | None = None
    storage: Storage | None = None
    gates: list[Gate] | None = None
    notes: list[str] | None = None
    files: dict[FileName, str] | None = None
    proof: Proof | None = None


class Sparsity(Part):
    """Zeros of a sparsify run."""

    achieved: Fraction
    target: Fraction | None = None
    zeros: Count
    of: Count
    whole_model: Fraction | None = None
    pattern: PatternName
    violations: Count


class ScoreStatistics(Part):
    """Scores of the weights of a linear, or of units."""

    min: Number
    max: Number
    mean: Number
    std: Number


class Layer(Part):
    """A pruned linear."""

    name: Text
    tensor: Text
    transposed: bool
    shape: Pair
    sparsity: Fraction
    pattern: PatternName = ""
    relative_error: Number | None = None
    seconds: Number | None = None
    damping: Number | None = None
    score_statistics: ScoreStatistics | None = None


class TrainingStep(Part):
    """One recorded step of training."""

    step: Count
    loss: Number | None
    held_out: Number | None
    rate: Number | None = None
    sparsity: Fraction | None = None
    achieved: Fraction | None = None
    factors: dict[Kind, Number] | None = None
    distillation: dict[Text, Number] | None = None
    ranks: dict[Text, Number] | None = None
    units: dict[Kind, Count] | None = None
    parameters: Count | None = None


class Training(Part):
    """Training after or during pruning."""

    base: Number
    post: Number | None
    final: Number
    recovery: Number | None
    steps: Count
    history: list[TrainingStep]


class SparsifyReport(Run):
    """The report of a run that sets weights to zero."""

    kind: None = None
    sparsity: Sparsity
    layers: list[Layer]
    training: Training | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        check_unique(layer.name for layer in self.layers)
        return self


class Units(Part):
    """The units of one place."""

    name: Text
    kind: Kind
    units: Annotated[int, Field(ge=1)]
    kept: list[Count]
    sparsity: Fraction
    parameters: Count
    scores: list[Number]
    score_statistics: ScoreStatistics | None = None
    entropy: list[FiniteFloat] | None = None
    truth: list[Number] | None = None

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if len({*self.kept}) != len(self.kept) or max(self.kept, default=0) >= self.units:
            raise ValueError("kept is not a list of different units below units")
        for name, values in (("scores", self.scores), ("truth", self.truth)):
            if values is not None and len(values) != self.units:
                raise ValueError(f"{name} has {len(values)} values for {self.units} units")
        return self


class RemovedUnits(Part):
    """Removed units and parameters of a structured run."""

    achieved: Fraction
    target: Fraction | None = None
    budget: Fraction | None = None
    pattern: str
    removed: dict[Kind, Pair]
    parameters: Pair
    whole_model: FiniteFloat


class ViewedHead(Part):
    """One attention head, shown token by token."""

    layer: Text
    head: Count
    score: Number
    attention: Matrix
    activity: list[FiniteFloat]
    kept: bool


class Views(Part):
    """Heads and layers that are shown one by one."""

    tokens: Annotated[list[str], Field(min_length=1)]
    heads: Annotated[list[ViewedHead], Field(min_length=1)]
    redundancy: dict[Text, Matrix]

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        count = len(self.tokens)
        for head in self.heads:
            if not is_square(head.attention, count) or len(head.activity) != count:
                raise ValueError(f"a head of {head.layer} is not shown for {count} tokens")
        for name, matrix in self.redundancy.items():
            if not is_square(matrix, len(matrix)):
                raise ValueError(f"redundancy of {name} is not a square")
        return self


class UnitsReport(Run):
    """The report of a run that removes units."""

    kind: Literal["units"]
    sparsity: RemovedUnits
    layers: list[Units]
    stock: bool | None = None
    views: Views | None = None
    training: Training | None = None
    agreement: dict[str, Number | None] | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        check_unique(layer.name for layer in self.layers)
        return self
