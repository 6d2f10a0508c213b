"""Outlier-aware salience: how much a unit gives and how much the loss minds, plus its outliers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import override

from prunekit.structured.gated_model import GatedModel, Scores
from prunekit.structured.rankers.base import Ranker

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.distributed.ranks import Ranks
    from prunekit.models.units.heads_neurons import Site
    from prunekit.structured.batches import Batch


class Salience(Ranker):
    """``(Σ|h|) · (Σ|∂L/∂h|) + √Kurt`` of what a unit gives (Zhao et al., APT, arXiv:2401.12200).

    The two sums run over all tokens and over the inputs of the unit, each by itself: eq. 5. Kurt
    is the excess kurtosis of the weights that read the unit, each times its mean input, not below
    0: as the authors' code has it.
    """

    name: ClassVar[str] = "salience"
    needs_loss: ClassVar[bool] = True

    product: Literal["sums", "calls", "elements"] = "sums"
    """Of sums over all batches; "calls": added up over batches; "elements": ``Σ|h g|``."""

    outliers: bool = True
    """False leaves the kurtosis out."""

    @override
    def score(self, subject: GatedModel) -> Scores:
        states = {site.name: _state(site) for site in subject.sites}
        for batch in subject.batches:
            self._add(subject, batch, states)
        if subject.ranks.is_distributed:
            states = _merged(states, subject.ranks)
        return {site.name: self._score(site, states[site.name]).cpu() for site in subject.sites}

    def _score(self, site: Site, state: Tensor) -> Tensor:
        import torch
        from prunekit_kernels import apt_score, weight_moments

        from prunekit.models.units.heads_neurons import matrix

        weight = matrix(site.reader.linear).detach().float()
        moments = weight_moments(weight)
        if not self.outliers:
            moments = torch.zeros_like(moments)  # of no weights, whose kurtosis is 0
        return apt_score(state, moments, width=site.span, product=self.product)

    def _add(self, subject: GatedModel, batch: Batch, states: dict[str, Tensor]) -> None:
        """Run one batch forward and backward, and add what each linear reads and its gradient."""
        from prunekit_kernels import salience

        from prunekit.structured.batches import valid_tokens
        from prunekit.structured.probes.reader_inputs import inputs_and_gradients

        seen, gradients, predictions = inputs_and_gradients(subject, batch, outputs=False)
        for site, h, g in zip(subject.sites, seen, gradients, strict=True):
            valid = valid_tokens(batch, decodes=site.stack.reads is not None)
            valid = None if valid is None else valid.flatten()
            of_mean = (g / max(predictions, 1.0)).flatten(0, -2)
            salience(h.flatten(0, -2), of_mean, states[site.name], valid)


def _merged(states: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Return the states of all ranks, merged in their order."""
    import torch
    from prunekit_kernels import merge

    every = ranks.all_gather_object({name: state.cpu() for name, state in states.items()})
    found = {name: torch.zeros_like(state) for name, state in states.items()}
    for each in every:
        for name, state in found.items():
            merge(state, each[name].to(state.device))
    return found


def _state(site: Site) -> Tensor:
    from prunekit_kernels import new_state

    from prunekit.models.units.heads_neurons import matrix

    weight = matrix(site.reader.linear)
    return new_state(weight.shape[1], weight.device)
