"""Block OBS: what is lost of a layer's output when a unit goes and the others make up for it.

With H = XᵀX of what the reading linear reads, and P the inputs of a unit,

    loss = tr(W_P [(H⁻¹)_PP]⁻¹ W_Pᵀ),  and the best weights of the kept K are  W H_:K (H_KK)⁻¹.

Source: Kurtic et al., ZipLM, eq. 3, arXiv:2302.04089; Hassibi & Stork, 1993, for one weight.
Shapes: U units, S inputs of each, O outputs and I inputs of the linear, K inputs kept.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from prunekit_kernels import gram, mirror
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from prunekit.errors import NumericsError
from prunekit.rankers.base import Ranker, Scores, Subject, look
from prunekit.sites import Site, matrix


class BlockObs(Ranker):
    """``tr(W_P [(H⁻¹)_PP]⁻¹ W_Pᵀ)`` a token, by the layer's whole output if ``relative``."""

    name: ClassVar[str] = "obs"

    damping: float = Field(default=0.01, gt=0)
    """What is added to the diagonal of H, as a part of its mean."""

    relative: bool = True
    """Divided by ``tr(W H Wᵀ)``, so that layers whose outputs are large do not outweigh others."""

    @override
    def score(self, subject: Subject) -> Scores:
        grams = gather(subject)
        return {site.name: self._score(site, grams[site.name]) for site in subject.sites}

    def _score(self, site: Site, total: Float[Tensor, "I I"]) -> Float[Tensor, " U"]:
        weight = matrix(site.reader.linear).detach().double().cpu()
        damped = damp(total, self.damping, site.name)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        index = site.reader.index.flatten(1)  # [U, S]
        blocks = inverse[index[:, :, None], index[:, None, :]]
        columns = weight[:, index].movedim(1, 0)  # [U, O, S]
        lost = (torch.linalg.solve(blocks, columns, left=False) * columns).sum((1, 2))
        if not self.relative:
            return lost
        return lost / ((weight @ total.double().cpu()) * weight).sum().clamp_min(1e-300)


def gather(subject: Subject, *, gated: bool = True) -> dict[str, Float[Tensor, "I I"]]:
    """Return H of each site, divided by its tokens; ``gated`` as in :func:`look`."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def see(site: Site, x: Tensor) -> None:
        if site.name not in sums:
            sums[site.name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        gram(x, sums[site.name])
        tokens[site.name] = tokens.get(site.name, 0) + len(x)

    look(subject, see, gated=gated)
    return {name: mirror(total).div_(max(tokens[name], 1)) for name, total in sums.items()}


def damp(total: Float[Tensor, "I I"], damping: float, name: str) -> Float[Tensor, "I I"]:
    """Return H in float64 on the CPU with ``damping`` times its mean diagonal added to that.

    Raises:
        NumericsError: H is zero or not finite.
    """
    damped = total.double().cpu()
    mean = float(damped.diagonal().mean())
    if not 0 < mean < float("inf"):
        raise NumericsError(
            f"{name}: its inputs have a mean square of {mean}. If all of its units are gated off, "
            "leave it out; otherwise the data makes the model overflow."
        )
    damped.diagonal().add_(damping * mean)
    return damped


@torch.no_grad()
def refit(
    site: Site, total: Float[Tensor, "I I"], keep: Sequence[int], damping: float = 0.01
) -> None:
    """Change the kept columns of the reading linear, in place, to make up for the others."""
    weight = matrix(site.reader.linear)
    columns = site.reader.index[list(keep)].flatten()
    damped = damp(total, damping, site.name)
    target = weight.double().cpu() @ damped[:, columns]
    factor = torch.linalg.cholesky(damped[columns][:, columns])
    fitted = torch.cholesky_solve(target.T, factor).T
    weight[:, columns.to(weight.device)] = fitted.to(weight)
