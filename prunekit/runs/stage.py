"""Stages of a run, the same for all kinds."""

from enum import Enum


class Stage(Enum):
    """What a run is doing, or how it ended.

    A stage may only change into one of its ``next``.
    """

    IDLE = "idle"
    CALIBRATING = "calibrating"
    SCORING = "scoring"
    PRUNING = "pruning"
    TUNING = "tuning"
    EVALUATING = "evaluating"
    EXPORTING = "exporting"
    VERIFYING = "verifying"
    COMPLETE = "complete"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def title(self) -> str:
        """The stage in words."""
        return TITLES[self]

    @property
    def ended(self) -> bool:
        """Whether the run does nothing any more."""
        return self in ENDS

    @property
    def next(self) -> frozenset["Stage"]:
        """The stages that may follow; an ended run may begin again."""
        if self.ended:
            return frozenset({Stage.IDLE})
        return frozenset({*NEXT[self], Stage.FAILED, Stage.STOPPED}) - {self}


TITLES = {
    Stage.IDLE: "Before its first step",
    Stage.CALIBRATING: "Reading calibration text",
    Stage.SCORING: "Scoring",
    Stage.PRUNING: "Pruning",
    Stage.TUNING: "Training",
    Stage.EVALUATING: "Evaluating",
    Stage.EXPORTING: "Writing the checkpoint",
    Stage.VERIFYING: "Verifying the written files",
    Stage.COMPLETE: "Complete",
    Stage.FAILED: "Failed",
    Stage.STOPPED: "Stopped",
}
ENDS = frozenset({Stage.COMPLETE, Stage.FAILED, Stage.STOPPED})
_WORK = frozenset({Stage.SCORING, Stage.PRUNING, Stage.TUNING, Stage.EXPORTING})
NEXT = {
    Stage.IDLE: {Stage.CALIBRATING, Stage.EVALUATING},
    Stage.CALIBRATING: {Stage.EVALUATING, *_WORK},
    Stage.SCORING: {*_WORK},
    Stage.PRUNING: {*_WORK},
    Stage.TUNING: {*_WORK},
    # A sweep measures each model, and goes on with the next run.
    Stage.EVALUATING: {*_WORK, Stage.CALIBRATING, Stage.VERIFYING, Stage.COMPLETE},
    Stage.EXPORTING: {Stage.EVALUATING, Stage.VERIFYING, Stage.COMPLETE},
    Stage.VERIFYING: {Stage.EVALUATING, Stage.EXPORTING, Stage.COMPLETE},
}
"""Stages that may follow a stage, besides a failure and a stop."""
