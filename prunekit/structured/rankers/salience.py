"""Outlier-aware salience: activation times gradient, plus the kurtosis of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import override

from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.distributed.ranks import Ranks
    from prunekit.models.units.heads_neurons import LinearUnitGroup
    from prunekit.structured.batches import Batch


class Salience(Ranker):
    """``(Σ|h|) · (Σ|∂L/∂h|) + √Kurt`` of a unit's output h (Zhao et al., APT, arXiv:2401.12200).

    Both sums run over all tokens and all inputs of the unit, each separately: eq. 5. Kurt is the
    excess kurtosis of the weights that read the unit, each times its mean input, clamped at 0, as
    in the authors' code.
    """

    name: ClassVar[str] = "salience"
    needs_loss: ClassVar[bool] = True

    product: Literal["sums", "calls", "elements"] = "sums"
    """Product of the sums over all batches; "calls": per batch, then summed; "elements":
    ``Σ|h g|``."""

    outliers: bool = True
    """False omits the kurtosis."""

    @override
    def score(self, gated: GatedModel) -> Scores:
        states = {group.name: _state(group) for group in gated.groups}
        for batch in gated.batches:
            self._add(gated, batch, states)
        if gated.ranks.is_distributed:
            states = _merged(states, gated.ranks)
        return {group.name: self._score(group, states[group.name]).cpu() for group in gated.groups}

    def _score(self, group: LinearUnitGroup, state: Tensor) -> Tensor:
        import torch
        from prunekit_kernels import apt_score, weight_moments

        from prunekit.models.orientation import weight_matrix

        weight = weight_matrix(group.reader.linear).detach().float()
        moments = weight_moments(weight)
        if not self.outliers:
            moments = torch.zeros_like(moments)  # moments of no weights, with kurtosis 0
        return apt_score(state, moments, width=group.features_per_unit, product=self.product)

    def _add(self, gated: GatedModel, batch: Batch, states: dict[str, Tensor]) -> None:
        """Run one batch forward and backward, and add to the states."""
        from prunekit_kernels import salience

        from prunekit.structured.batches import valid_tokens
        from prunekit.structured.probes.reader_inputs import inputs_and_gradients

        inputs, gradients, predictions = inputs_and_gradients(gated, batch, outputs=False)
        for group, h, g in zip(gated.groups, inputs, gradients, strict=True):
            valid = valid_tokens(batch, decodes=group.stack.reads is not None)
            valid = None if valid is None else valid.flatten()
            mean_gradient = (g / max(predictions, 1.0)).flatten(0, -2)
            salience(h.flatten(0, -2), mean_gradient, states[group.name], valid)


def _merged(states: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Return the states merged over all ranks, in rank order."""
    import torch
    from prunekit_kernels import merge

    every = ranks.all_gather_object({name: state.cpu() for name, state in states.items()})
    merged = {name: torch.zeros_like(state) for name, state in states.items()}
    for each in every:
        for name, state in merged.items():
            merge(state, each[name].to(state.device))
    return merged


def _state(group: LinearUnitGroup) -> Tensor:
    from prunekit_kernels import new_state

    from prunekit.models.orientation import weight_matrix

    weight = weight_matrix(group.reader.linear)
    return new_state(weight.shape[1], weight.device)
