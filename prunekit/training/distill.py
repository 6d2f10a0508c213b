"""Self-distillation: a training objective towards the outputs of a teacher.

    L = μ L_distill + (1 − μ) L_ft,    L_distill = w_pred L_pred + w_layers L_layer,
    L_pred = T²/N Σ KL(teacher ‖ student),    L_layer = Σ_i MSE(Tr(H_s^φ(i)), H_t^i)

with one block i of the teacher drawn from each quarter of depth at every step; see
:class:`prunekit.config.distill_table.Distill`. Means run over the predictions N and the tokens of
the whole batch, padding excepted. Source: Zhao et al., APT, section 4.4, arXiv:2401.12200; the
closest block is that of Xia et al., CoFi, arXiv:2204.00408.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.config.distill_table import Distill
from prunekit.models.units.base import Kept
from prunekit.structured.batches import (
    Batch,
    predicted_labels,
    prediction_logits,
    sample_losses,
    valid_tokens,
)
from prunekit.training.data_parallel import Losses, Share, fine_tuning_loss
from prunekit.training.distill_blocks import BlockMap, Target, kept_coordinates, stream_width
from prunekit.training.distill_losses import Transformations, divergence, squared_distance
from prunekit.training.teachers import SharedTeacher, Teacher, recorded_outputs


class Distiller:
    """Training objective with the distance from a teacher.

    Attributes:
        teacher: The teacher.
        settings: Weights, temperature and mapping.
        steps: Steps between which μ rises.
        step: Number of steps begun.
        transformations: Of hidden states; trained with the model, and not part of it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: Teacher,
        settings: Distill,
        steps: tuple[int, int],
        seed: int = 0,
        *,
        kept: Kept | None = None,
    ) -> None:
        """Prepare a distillation; nothing is run yet.

        Args:
            model: The student, which may have gates or adapters.
            teacher: The teacher.
            settings: Weights, temperature and mapping.
            steps: Steps between which μ rises from 0 to 1, counted from 1.
            seed: Seed of the draws and of the transformations.
            kept: If blocks or coordinates were removed from the student before: the kept ones by
                group name, as :class:`prunekit.structured.finalize.Finalized` has them. Entries of
                other kinds are not used.

        Raises:
            ConfigError: The models differ in width or depth, and ``kept`` does not say how; or the
                teacher is of another family.
        """
        self.teacher, self.settings, self.steps, self.step = teacher, settings, steps, 0
        self._seed, self._lowest = seed, float("inf")
        self._blocks = BlockMap(model, teacher, kept or {})
        width = stream_width(teacher.model)
        places = kept_coordinates(model, width, kept or {})
        self.transformations = Transformations(width, settings.rank, seed, model.device, places)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters that the model's optimizer has to train too."""
        return [*self.transformations.named_parameters().values()]

    @property
    def mu(self) -> float:
        """μ of the current step, from 0 to 1."""
        start, end = self.steps
        return min(1.0, max(0.0, (self.step - start) / (end - start)))

    def __call__(self, model: PreTrainedModel, share: Share) -> Losses:
        """Run teacher and student on a share of a batch."""
        self.step += 1
        if not self.mu:
            return fine_tuning_loss(model, share)
        targets = []
        if self.settings.layers:
            targets = self._blocks.targets(self._seed, self.step, self.settings.map)
        blocks = [target.block for target in targets]
        theirs = self.teacher.outputs(share.samples, blocks)
        labels = predicted_labels(model, share.samples)
        candidates = {block: None for target in targets for block in target.candidates}
        with recorded_outputs([*candidates]) as hidden:
            output = model(**share.samples).logits
        logits = prediction_logits(model, output, labels)
        loss = sample_losses(logits, labels)[0].sum() / share.predictions
        parts = {}
        if self.settings.prediction:
            truth = prediction_logits(model, theirs.logits, labels)
            total = divergence(logits, truth, labels, self.settings.temperature)
            parts["prediction"] = total / share.predictions
        if targets:
            parts["layer"] = self._layer_loss(share, targets, theirs.hidden, hidden)
        weights = {"prediction": self.settings.prediction, "layer": self.settings.layers}
        distilled = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return Losses(self.mu * distilled + (1 - self.mu) * loss, loss, parts)

    def measured(self, held_out: float) -> None:
        """Refresh the teacher if a held-out loss has improved."""
        if held_out < self._lowest < float("inf"):
            self.teacher.refresh()
        self._lowest = min(held_out, self._lowest)

    def tensors(self) -> dict[str, Tensor]:
        """Return the values that are the same on all ranks."""
        named = {f"teacher.{name}": each for name, each in self.teacher.tensors().items()}
        return named | dict(self.transformations.named_parameters())

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed training needs besides the optimizer's state."""
        named = self.transformations.named_parameters()
        shared = isinstance(self.teacher, SharedTeacher)
        return {
            "step": self.step,
            "lowest": self._lowest,
            "transformations": {name: each.detach().clone() for name, each in named.items()},
            "teacher": self.teacher.tensors() if shared else {},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, with the model of the same step."""
        self.step, self._lowest = state["step"], state["lowest"]
        for name, each in self.transformations.named_parameters().items():
            each.copy_(state["transformations"][name])
        if isinstance(self.teacher, SharedTeacher):
            self.teacher.load_tensors(state["teacher"])

    def _layer_loss(
        self,
        share: Share,
        targets: Sequence[Target],
        theirs: Sequence[Tensor],
        ours: Mapping[nn.Module, Tensor],
    ) -> Float[Tensor, ""]:
        """Return this rank's part of the blocks' mean squared distances.

        Args:
            share: The share of the batch.
            targets: The drawn blocks.
            theirs: Hidden states of each in the teacher.
            ours: Hidden states of the student, by block.
        """
        chosen = [target.candidates[0] for target in targets]
        if self.settings.map == "closest":
            chosen = self._closest(share, targets, theirs, ours)
        parts = [
            self._mean_distance(share, target, ours[block], truth)
            for target, block, truth in zip(targets, chosen, theirs, strict=True)
        ]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def _closest(
        self,
        share: Share,
        targets: Sequence[Target],
        theirs: Sequence[Tensor],
        ours: Mapping[nn.Module, Tensor],
    ) -> list[nn.Module]:
        """Return the closest candidate of each target, over all ranks."""
        found = [
            self._mean_distance(share, target, ours[block], truth)
            for target, truth in zip(targets, theirs, strict=True)
            for block in target.candidates
        ]
        distances = torch.stack(found) * share.counts
        share.ranks.all_reduce_sum(distances, "distances of blocks")
        parts = distances.split([len(target.candidates) for target in targets])
        return [
            target.candidates[int(part.argmin())]
            for target, part in zip(targets, parts, strict=True)
        ]

    def _mean_distance(
        self, share: Share, target: Target, ours: Tensor, theirs: Tensor
    ) -> Float[Tensor, ""]:
        """Return this rank's part of a mean squared distance."""
        moved = self.transformations.apply(ours, target.quarter)
        valid = valid_tokens(share.samples, decodes=target.decodes)
        tokens = _token_count(share.whole, theirs.shape[1], decodes=target.decodes)
        return squared_distance(moved, theirs, valid) / (tokens * theirs.shape[-1])


def _token_count(batch: Batch, length: int, *, decodes: bool) -> Tensor | int:
    """Return the number of valid tokens of a batch, at least 1."""
    valid: Bool[Tensor, "B T"] | None = valid_tokens(batch, decodes=decodes)
    return len(batch["input_ids"]) * length if valid is None else valid.sum().clamp_min(1)
