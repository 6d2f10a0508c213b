"""ADMM: weights and their pattern of zeros, optimised jointly.

Minimises tr((B − D) A (B − D)ᵀ) over the D that a projection allows, where A is the damped Gram
matrix scaled to a unit diagonal and B the weight scaled to match, so that |B| is Wanda's score:

    s = √diag(G + λI),  A = (G + λI) / (s sᵀ),  B = W ∘ s
    X = B + ρ (D − U − B)(A + ρI)⁻¹           one product of [O, I] by [I, I]
    D, U = P(X + U), X + U − P(X + U)         the projection, U is the scaled dual
    U *= ρ / ρ′                               when the penalty changes from ρ to ρ′

X is the published (BA − ρU + ρD)(A + ρI)⁻¹, written without BA. The inverse is computed once per
penalty, by Cholesky: on a CPU, at I = 2048, an eigendecomposition that serves all penalties takes
as long as five of them (and one more product for each), and two triangular solves instead of the
product take 1.6 times as long as the product.

Source: Meng et al., ALPS, §3.2, arXiv:2406.07831; Boyd et al., Distributed Optimization, §9.1.
Shapes: O output features, I input features.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit_kernels._precision import full_precision, search_precision
from prunekit_kernels.inverse_factor import cholesky, invert_factored
from prunekit_kernels.pending import value_of

Project = Callable[[Float[Tensor, "O I"], Float[Tensor, "O I"]], None]
Inverse = Callable[[float, Float[Tensor, "I I"] | None], Float[Tensor, "I I"]]
COMMON = 0.45
"""Energy share of one direction above which inputs count as strongly correlated.

With Wanda's scale, ADMM's error exceeds that of refined SparseGPT from 0.5 on. Layers of four small
models have at most 0.38."""
FLOOR = 0.01
"""Least share of an input's energy that no other input explains, as float32 can resolve it."""
POWERS = 10
"""Power iterations; where it matters the largest eigenvalue is far above the next."""


def admm(
    target: Float[Tensor, "O I"],
    gram: Float[Tensor, "I I"],
    scale: Float[Tensor, " I"],
    project: Project,
    penalties: Iterable[float],
    inverse: Inverse | None = None,
) -> Float[Tensor, "O I"]:
    """Return D, in the scale of B, after one iteration per penalty.

    Args:
        target: B, the scaled weight. Allocates three more matrices of its size (one is the result),
            one of the size of ``gram``, and the projection's own memory.
        gram: G, both triangles; not changed.
        scale: s, from :func:`unit_scale`, which contains the damping. ``inverse`` must match any
            other scale.
        project: ``project(x, dual)`` replaces, in place, ``x`` by the allowed matrix nearest to
            x + dual, and ``dual`` by the remainder of the sum.
        penalties: ρ of each iteration; equal neighbours share one inverse.
        inverse: ``inverse(penalty, spare)`` returns the result of :func:`damped_inverse`, for
            callers that have it from elsewhere; ``spare`` is the previous inverse, free for reuse.

    Raises:
        ArithmeticError: A + ρI is not positive definite, so G is not a Gram matrix.
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
            search_product(target, difference, inverted, penalty, solution)
            project(solution, dual)
    return solution


def search_product(
    target: Float[Tensor, "O I"],
    difference: Float[Tensor, "O I"],
    inverted: Float[Tensor, "I I"],
    penalty: float,
    out: Float[Tensor, "O I"],
) -> None:
    """Write the solution X = B + ρ (D − U − B)(A + ρI)⁻¹.

    A GPU rounds the operands to TF32. The error of a layer, after the conjugate gradients that
    follow in float32, is the same: bench/results/quality/search_products.md.
    """
    with search_precision():
        torch.addmm(target, difference, inverted, alpha=penalty, out=out)


def unit_scale(gram: Float[Tensor, "I I"], ridge: float | Float[Tensor, ""]) -> Float[Tensor, " I"]:
    """Return s = √diag(G + λI), where λ is ``ridge``.

    The diagonal of a dead input counts as 1.
    """
    diagonal = gram.diagonal()
    return (torch.where(diagonal == 0, 1, diagonal) + ridge).sqrt()


def common_share(gram: Float[Tensor, "I I"], unit: Float[Tensor, " I"]) -> Float[Tensor, ""]:
    """Return the share of input energy in one direction, 0 to 1, float64.

    A large share mostly comes from a large mean. It is the largest eigenvalue of A over I, by power
    iteration; ``unit`` is the scale of the inputs.
    """
    direction = torch.ones_like(unit)
    energy = direction.norm()
    for _ in range(POWERS):
        direction = torch.mv(gram, direction / unit).div_(unit)
        energy = direction.norm()
        direction /= energy.clamp_min(torch.finfo(direction.dtype).tiny)
    return energy.double() / max(len(unit), 1)


def own_scale(unit: Float[Tensor, " I"], inverse: Float[Tensor, "I I"]) -> Float[Tensor, " I"]:
    """Return the scale that makes |B| the root of the optimal-brain-surgeon score.

    The score is W² / ((G + λI)⁻¹)ⱼⱼ, so that an input counts by the energy that other inputs do not
    explain. By Wanda's score, inputs with a large common mean count for that mean, which each of
    them can supply.

    Args:
        unit: From :func:`unit_scale`.
        inverse: (A + :data:`FLOOR` I)⁻¹, with a unit diagonal of A.
    """
    return unit * inverse.diagonal().rsqrt()


def admm_reference(
    target: Float[Tensor, "O I"],
    unit: Float[Tensor, "I I"],
    project: Project,
    penalties: Iterable[float],
) -> Float[Tensor, "O I"]:
    """Return the same as published: unscaled dual, given A, solved systems.

    Args:
        target: B, the scaled weight.
        unit: A, with a unit diagonal.
        project: As in :func:`admm`.
        penalties: ρ of each iteration.
    """
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
    """Return (A + ρI)⁻¹, both triangles.

    Args:
        gram: G, both triangles.
        scale: s.
        penalty: ρ.
        spare: Memory for the result, or None.
        unit: From :func:`unit_scale`, if that is not ``scale``.

    Raises:
        ArithmeticError: A + ρI is not positive definite, so G is not a Gram matrix.
    """
    work = torch.empty_like(gram) if spare is None else spare
    torch.div(gram, scale, out=work).div_(scale[:, None])
    work.fill_diagonal_(1 + penalty)
    if unit is not None:
        work.diagonal().copy_((unit / scale).square_().add_(penalty))
    lower = work.T
    succeeded = cholesky(lower)
    if succeeded is not False:
        invert_factored(lower)
    if not value_of(succeeded):
        raise ArithmeticError("The Gram matrix is not positive definite.")
    return work
