"""ADMM: the best weights with a pattern of zeros that is searched for along with them.

Minimises tr((B − D) A (B − D)ᵀ) over the D that a projection allows, where A is the damped Gram
matrix scaled to a unit diagonal and B the weight scaled to match, so that |B| is Wanda's score:

    s = √diag(G + λI),  A = (G + λI) / (s sᵀ),  B = W ∘ s
    X = B + ρ (D − U − B)(A + ρI)⁻¹           one product of [O, I] by [I, I]
    D, U = P(X + U), X + U − P(X + U)         the projection, U is the scaled dual
    U *= ρ / ρ′                               when the penalty changes from ρ to ρ′

X is (BA − ρU + ρD)(A + ρI)⁻¹ as it is published, written without BA. The inverse is made once for
each penalty, by Cholesky: on a CPU, at I = 2048, an eigendecomposition that serves all penalties
takes as long as five of them (and one more product for each), and two triangular solves instead of
the product take 1.6 times as long as it.

Source: Meng et al., ALPS, §3.2, arXiv:2406.07831; Boyd et al., Distributed Optimization, §9.1.
Shapes: O output features, I input features.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit_kernels._precision import full_precision
from prunekit_kernels.inverse_factor import cholesky

Project = Callable[[Float[Tensor, "O I"], Float[Tensor, "O I"]], None]
Inverse = Callable[[float, Float[Tensor, "I I"] | None], Float[Tensor, "I I"]]
COMMON = 0.45
"""Share of one direction above which inputs have much in common: with Wanda's scale ADMM errs more
than refined SparseGPT from a half on. Layers of four small models have 0.38 at most."""
FLOOR = 0.01
"""What is an input's own is at least about so much of its energy: that much float32 can tell."""
POWERS = 10
"""Iterations; where it matters the largest eigenvalue is far above the next."""


def admm(
    target: Float[Tensor, "O I"],
    gram: Float[Tensor, "I I"],
    scale: Float[Tensor, " I"],
    project: Project,
    penalties: Iterable[float],
    inverse: Inverse | None = None,
) -> Float[Tensor, "O I"]:
    """Return D, in the scale of B, after one iteration for each of ``penalties``.

    Args:
        target: B, the scaled weight. Beside it, three matrices of its size are allocated (one is
            the result), one of the size of ``gram``, and what the projection allocates.
        gram: G, both triangles; nothing is changed.
        scale: s, from :func:`unit_scale`: it holds the damping. Of another, ``inverse`` has to be.
        project: ``project(x, dual)`` replaces, in place, ``x`` by the allowed matrix nearest to
            x + dual, and ``dual`` by what is left of the sum.
        penalties: ρ of each iteration; equal neighbours share one inverse.
        inverse: ``inverse(penalty, spare)`` returns what :func:`damped_inverse` does, for those who
            have it from elsewhere; ``spare`` is the last one, which is not needed any more.

    Raises:
        ArithmeticError: A + ρI is not positive definite, so G is no Gram matrix.
    """
    solution, dual = target.clone(), torch.zeros_like(target)
    project(solution, dual)
    dual.zero_()
    difference = torch.empty_like(target)
    inverse = inverse or partial(damped_inverse, gram, scale)
    inverted, before = None, 0.0
    with full_precision():
        for penalty in penalties:
            if penalty != before:
                inverted = inverse(penalty, inverted)
                dual *= before / penalty
                before = penalty
            torch.sub(solution, dual, out=difference).sub_(target)
            assert inverted is not None
            torch.addmm(target, difference, inverted, alpha=penalty, out=solution)
            project(solution, dual)
    return solution


def unit_scale(gram: Float[Tensor, "I I"], ridge: float) -> Float[Tensor, " I"]:
    """Return s = √diag(G + λI), where λ is ``ridge``; of a dead input the diagonal counts 1."""
    diagonal = gram.diagonal()
    return (torch.where(diagonal == 0, 1, diagonal) + ridge).sqrt()


def common_share(gram: Float[Tensor, "I I"], unit: Float[Tensor, " I"]) -> float:
    """Return how much of the energy of inputs scaled by ``unit`` lies in one direction, 0 to 1.

    That is a large mean, mostly: the largest eigenvalue of A over I, by power iteration.
    """
    direction, energy = torch.ones_like(unit), 0.0
    for _ in range(POWERS):
        direction = torch.mv(gram, direction / unit).div_(unit)
        energy = float(direction.norm())
        direction /= max(energy, torch.finfo(direction.dtype).tiny)
    return energy / max(len(unit), 1)


def own_scale(unit: Float[Tensor, " I"], inverse: Float[Tensor, "I I"]) -> Float[Tensor, " I"]:
    """Return s so that |B| is the score of optimal brain surgeon, W² / ((G + λI)⁻¹)ⱼⱼ, as its root.

    So an input counts as much as the others do not tell of it. By Wanda's score alone inputs that
    share a large mean count for that, which each of them can give.

    Args:
        unit: What :func:`unit_scale` returns.
        inverse: (A + :data:`FLOOR` I)⁻¹, with a unit diagonal of A.
    """
    return unit * inverse.diagonal().rsqrt()


def admm_reference(
    target: Float[Tensor, "O I"],
    unit: Float[Tensor, "I I"],
    project: Project,
    penalties: Iterable[float],
) -> Float[Tensor, "O I"]:
    """Do the same as published: V is the unscaled dual, A is given, systems are solved."""
    solution, rest = target.clone(), torch.zeros_like(target)
    project(solution, rest)
    dual = torch.zeros_like(target)
    for penalty in penalties:
        system = unit + penalty * torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
        right = target @ unit - dual + penalty * solution
        x = torch.linalg.solve(system, right, left=False)
        solution, rest = x.clone(), dual / penalty
        project(solution, rest)
        dual += penalty * (x - solution)
    return solution


def damped_inverse(
    gram: Float[Tensor, "I I"],
    scale: Float[Tensor, " I"],
    penalty: float,
    spare: Float[Tensor, "I I"] | None = None,
    unit: Float[Tensor, " I"] | None = None,
) -> Float[Tensor, "I I"]:
    """Return (A + ρI)⁻¹, both triangles, in the memory of ``spare`` where there is one.

    ``unit`` is what :func:`unit_scale` returns, where that is not ``scale``.

    Raises:
        ArithmeticError: A + ρI is not positive definite, so G is no Gram matrix.
    """
    work = torch.empty_like(gram) if spare is None else spare
    torch.div(gram, scale, out=work).div_(scale[:, None])
    work.fill_diagonal_(1 + penalty)
    if unit is not None:
        work.diagonal().copy_((unit / scale).square_().add_(penalty))
    lower = work.T
    if not cholesky(lower):
        raise ArithmeticError("The Gram matrix is not positive definite.")
    torch.cholesky_inverse(lower, out=lower)
    return work
