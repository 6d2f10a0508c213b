"""Reports of sweeps."""

from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, JsonValue, model_validator

from prunekit.models.units.kinds import Kind
from prunekit.reports.schema.runs import Report
from prunekit.reports.schema.values import Count, Fraction, Number, Part, Text, is_square


class MeasuredText(Part):
    """A measure of one model on one text."""

    data: str
    metric: Text
    value: Number
    protocol: str


class Measured(Part):
    """Measures of one model of a sweep."""

    evaluation: Annotated[list[MeasuredText], Field(min_length=1)]
    bytes: Count
    peak_rss_bytes: Count
    peak_device_bytes: Count
    prefill: FiniteFloat | None = None
    decode: FiniteFloat | None = None
    lexical_diversity: FiniteFloat | None = None
    repetition: FiniteFloat | None = None
    texts: list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None = None

    @property
    def shape(self) -> tuple[int, bool, int]:
        """Counts of texts, and whether speed was measured.

        They are equal for all models of a sweep.
        """
        return len(self.evaluation), self.decode is not None, len(self.texts or ())

    @model_validator(mode="after")
    def _speed_is_whole(self) -> Self:
        measured = {self.prefill is None, self.decode is None, self.repetition is None}
        if len(measured | {self.lexical_diversity is None}) > 1:
            raise ValueError("some of prefill, decode, lexical_diversity, repetition are missing")
        return self


class SweptRun(Measured):
    """One run of a sweep."""

    name: Text
    series: str
    prune: dict[str, JsonValue] = Field(default_factory=dict)
    calibration: dict[str, JsonValue] | None = None
    sparsity: Fraction
    achieved: Fraction
    parameters: Count
    active: dict[Kind, Count]
    whole: dict[Kind, Count]
    seconds: Number


class Agreement(Part):
    """How far rankers agree on one kind of units."""

    kind: str
    rankers: Annotated[list[str], Field(min_length=1)]
    spearman: list[list[Number | None]]

    @model_validator(mode="after")
    def _has_all_pairs(self) -> Self:
        if not is_square(self.spearman, len(self.rankers)):
            raise ValueError("spearman does not have a row and a column for each ranker")
        return self


class SweepReport(Report):
    """The report of a sweep."""

    kind: Literal["sweep"]
    dense: Measured
    runs: Annotated[list[SweptRun], Field(min_length=1)]
    agreement: list[Agreement] | None = None

    @model_validator(mode="after")
    def _runs_are_alike(self) -> Self:
        for run in self.runs:
            if run.shape != self.dense.shape:
                raise ValueError(f"{run.name} was not measured like the dense model")
            if run.active.keys() != run.whole.keys():
                raise ValueError(f"{run.name}: active and whole name other kinds")
        return self
