"""``[distill]``: training towards the outputs of the model before pruning."""

from typing import Literal, Self

from pydantic import Field, model_validator

from prunekit.config.tables import MOST_STEPS, Section


class Distill(Section):
    """Self-distillation: training towards the model before pruning, its teacher.

    The loss is ``L = μ L_distill + (1 − μ) L_ft`` with the loss L_ft on the text, and ``L_distill =
    prediction · L_pred + layers · L_layer`` (Zhao et al., APT, arXiv:2401.12200). The authors take
    prediction = 1 and layers = 0.9 for GLUE, 0.1 and 0.9 for SQuAD and CNN/DM.
    """

    prediction: float = Field(default=1.0, ge=0)
    """Weight of L_pred, the divergence of predictions from the teacher's."""
    layers: float = Field(default=0.9, ge=0)
    """Weight of L_layer, the mean squared distance of hidden states from the teacher's, summed over
    four blocks: at every step one is drawn anew from each quarter of depth."""
    temperature: float = Field(default=2.0, gt=0)
    """Divisor of the logits of both models in L_pred, which is multiplied by its square."""
    map: Literal["same", "closest"] = "same"
    """Block whose hidden states are compared with those of a teacher's block. same: the same one,
    or the nearest if it is removed; closest: the one with the smallest distance."""
    rank: int = Field(default=8, ge=1)
    """Rank of the transformation of hidden states, which starts as the identity and is not
    written."""
    start: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Step of training after which μ rises from 0."""
    end: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """Step at which μ is 1, as it is from then on. Default: the last step of training."""

    def steps(self, last: int) -> tuple[int, int]:
        """Return the steps between which μ rises."""
        return self.start, last if self.end is None else self.end

    def mistakes(self, last: int) -> dict[str, str]:
        """Return contradictions with the length of the training, by key."""
        start, end = self.steps(last)
        beyond = f"is beyond the training, which has {last} steps."
        if start >= last:
            return {"start": f"{start} {beyond}"}
        return {"end": f"{end} {beyond}"} if end > last else {}

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.end is not None and self.start >= self.end:
            raise ValueError(f"start = {self.start} is not before end = {self.end}.")
        if not self.prediction and not self.layers:
            raise ValueError("prediction and layers are both 0, so nothing is distilled.")
        return self
