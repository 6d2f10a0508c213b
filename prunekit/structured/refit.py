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
from prunekit.models.units.heads_neurons import Site, matrix
from prunekit.structured.probes.reader_inputs import observe_inputs

if TYPE_CHECKING:
    from prunekit.structured.gated_model import GatedModel


def gather(subject: GatedModel, *, gated: bool = True) -> dict[str, Float[Tensor, "I I"]]:
    """Return H of each site, divided by its tokens; ``gated`` as in :func:`look`."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, float] = {}

    def see(site: Site, x: Tensor) -> None:
        if site.name not in sums:
            sums[site.name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        gram(x, sums[site.name])
        tokens[site.name] = tokens.get(site.name, 0) + len(x)

    observe_inputs(subject, see, gated=gated)
    subject.add(sums.values())
    tokens = subject.total(tokens)
    return {name: mirror(total).div_(max(tokens[name], 1)) for name, total in sums.items()}


def damp(
    total: Float[Tensor, "I I"], damping: float, name: str
) -> tuple[Float[Tensor, "I I"], Float[Tensor, "I I"]]:
    """Return H with ``damping`` times its mean diagonal added to that, and its Cholesky factor.

    Both are float64 on the CPU. Sums in float32 may leave H less than positive definite; then ten
    times as much is added, and so on.

    Raises:
        NumericsError: H is zero, not finite, or not positive definite with all of the mean added.
    """
    damped = total.double().cpu()
    mean = float(damped.diagonal().mean())
    if not 0 < mean < float("inf"):
        raise NumericsError(
            f"{name}: its inputs have a mean square of {mean}. If all of its units are gated off, "
            "leave it out; otherwise the data makes the model overflow."
        )
    diagonal = damped.diagonal()
    found = diagonal.clone()
    while True:
        diagonal.copy_(found + damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return damped, factor
        if damping >= 1:
            raise NumericsError(
                f"{name}: the products of its inputs are not positive definite, even with the mean "
                "of their diagonal added to it. Use more calibration text."
            )
        damping = min(1.0, 10 * damping) or 1e-6


def removal_loss(
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
    inverse = torch.cholesky_inverse(damp(total, damping, site.name)[1])
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
    damped, _ = damp(total, damping, site.name)
    target = weight.double().cpu() @ damped[:, columns]
    factor = torch.linalg.cholesky(damped[columns][:, columns])
    fitted = torch.cholesky_solve(target.T, factor).T
    weight[:, columns.to(weight.device)] = fitted.to(weight)
