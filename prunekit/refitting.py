"""The linears that read units, refitted so that the kept ones make up for those that go.

With H = XᵀX of what such a linear reads, the best weights of the kept inputs K are
W H_:K (H_KK)⁻¹.

Shapes: U units, S inputs of the linear in each, I inputs in all, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from prunekit_kernels import gram, mirror
from torch import Tensor

from prunekit.errors import NumericsError
from prunekit.probes.looking import look
from prunekit.sites import Site, matrix

if TYPE_CHECKING:
    from prunekit.rankers.base import Subject


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


def lost(
    site: Site,
    total: Float[Tensor, "I I"],
    damping: float,
    minded: Float[Tensor, "O O"] | None = None,
) -> Float[Tensor, " U"]:
    """Return what is lost of what the linear gives if a unit goes and the others are refitted.

    ``tr(G W_P [(H⁻¹)_PP]⁻¹ W_Pᵀ)``, in float64, with G, ``minded``, how much an error of each pair
    of outputs weighs; all weigh 1 without it.
    """
    weight = matrix(site.reader.linear).detach().double().cpu()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damp(total, damping, site.name)))
    index = site.reader.index.flatten(1)  # [U, S]
    blocks = inverse[index[:, :, None], index[:, None, :]]
    columns = weight[:, index].movedim(1, 0)  # [U, O, S]
    weighed = columns if minded is None else minded @ columns
    return (torch.linalg.solve(blocks, columns, left=False) * weighed).sum((1, 2))


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
