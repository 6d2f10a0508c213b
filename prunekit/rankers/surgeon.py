"""LLM Surgeon: what the loss rises by when a unit goes and the others of its layer make up for it.

With H = XᵀX of what the reading linear reads, G = gᵀg of the gradients of the loss by what it
gives, and P the inputs of a unit, the loss rises, in Kronecker-factored second order, by

    ½ tr(G W_P [(H⁻¹)_PP]⁻¹ W_Pᵀ),

and the weights for that are those of a refit, whatever G is. Both are sums over a token.

Source: van der Ouderaa et al. 2024, The LLM Surgeon, §3.1 and 3.3, arXiv:2312.17244.
Shapes: U units, I inputs and O outputs of the linear.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from typing_extensions import override

from prunekit.kinds import Compensation
from prunekit.rankers.base import Ranker, Scores, Subject

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from prunekit.probes.batches import Batch
    from prunekit.sites import Site


class Surgeon(Ranker):
    """``½ tr(G W_P [(H⁻¹)_PP]⁻¹ W_Pᵀ)``: obs, but errors weigh what the loss minds them."""

    name: ClassVar[str] = "surgeon"
    needs_loss: ClassVar[bool] = True
    compensate: ClassVar[Compensation] = "refit"

    damping: float = Field(default=0.01, gt=0)
    """What is added to the diagonal of H, as a part of its mean."""

    @override
    def score(self, subject: Subject) -> Scores:
        from prunekit.refitting import gather, lost

        minded = self._minded(subject)
        grams = gather(subject)
        return {
            site.name: lost(site, grams[site.name], self.damping, minded[site.name]) / 2
            for site in subject.sites
        }

    def _minded(self, subject: Subject) -> dict[str, Float[Tensor, "O O"]]:
        """Return G of each site, a prediction, in float64 on the CPU."""
        import torch
        from prunekit_kernels import gram, mirror

        found: dict[str, Tensor] = {}
        predictions = 0.0
        for batch in subject.batches:
            gradients, count = _gradients(subject, batch)
            predictions += count
            for site, gradient in zip(subject.sites, gradients, strict=True):
                rows = gradient.flatten(0, -2)
                if site.name not in found:
                    found[site.name] = torch.zeros(2 * rows.shape[1:], device=rows.device)
                gram(rows, found[site.name])
        return {
            name: mirror(total).double().cpu() / max(predictions, 1.0)
            for name, total in found.items()
        }


def _gradients(subject: Subject, batch: Batch) -> tuple[tuple[Tensor, ...], float]:
    """Return the gradient of the summed loss by what each reading linear gives.

    Padding is not predicted from and gets none, but where other tokens look at it.
    """
    import torch

    from prunekit.probes.batches import losses

    given: dict[str, Tensor] = {}

    def keeping(site: Site):  # noqa: ANN202
        def hook(_: nn.Module, inputs: object, output: Tensor) -> None:  # noqa: ARG001
            given[site.name] = output

        return hook

    with ExitStack() as held, torch.enable_grad():
        for site in subject.sites:
            # What a gate that wants a gradient gives has one, though weights may be frozen.
            gate = subject.gates[site.name]
            held.enter_context(gate.holding(gate.value.detach().clone().requires_grad_()))
            held.callback(site.reader.linear.register_forward_hook(keeping(site)).remove)
        loss, predictions = losses(subject.model, batch)
        gradients = torch.autograd.grad(loss.sum(), [given[site.name] for site in subject.sites])
    return gradients, float(predictions.sum())
