"""PCG: the best weights on a fixed support, all rows together.

Minimises tr((V − W)(G + λI)(V − W)ᵀ) over the V that are zero outside ``keep``, by preconditioned
conjugate gradients. Rows do not mix, so each has its own step sizes; the preconditioner is the
diagonal. With A = G + λI, d = diag A:

    R = (W − V) A ∘ M;  P = R / d;  γ = Σ R∘(R / d)
    Q = P A ∘ M;  α = γ / Σ P∘Q;  V += α P;  R −= α Q;  γ′ = Σ R∘(R / d);  P = R / d + γ′/γ P

One iteration is one product of [O, I] by [I, I] and a few passes over [O, I].

Source: Meng et al., ALPS, §3.3, arXiv:2406.07831.
Shapes: O output features, I input features.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit_kernels._precision import full_precision
from prunekit_kernels.pending import is_remote


def pcg(
    weight: Float[Tensor, "O I"],
    target: Float[Tensor, "O I"],
    gram: Float[Tensor, "I I"],
    keep: Bool[Tensor, "O I"],
    ridge: float | Float[Tensor, ""] = 0.0,
    iterations: int = 10,
) -> None:
    """Move ``weight`` towards the best weights on the support ``keep``, in place.

    Outside the support ``weight`` must be zero. Products are float32 without TF32 (or float64),
    since γ falls by many orders of magnitude. A row at its optimum does not change by a bit; nor
    does any row when ``weight`` equals ``target``.

    Args:
        weight: V, the starting point. Allocates four more matrices of its size.
        target: W, which V approximates.
        gram: G, both triangles.
        keep: Support.
        ridge: λ, added to the diagonal of G without copying it.
        iterations: Each divides the remaining error by a factor that depends on the condition of G;
            10 as published.

    Raises:
        ValueError: Shapes, types or devices do not match.
    """
    outputs, inputs = weight.shape
    for name, tensor, shape, dtype in (
        ("target", target, (outputs, inputs), weight.dtype),
        ("gram", gram, (inputs, inputs), weight.dtype),
        ("keep", keep, (outputs, inputs), torch.bool),
    ):
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != weight.device:
            raise ValueError(
                f"{name} must be {dtype} of shape {shape} on {weight.device}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )
    if weight.numel():
        if not isinstance(ridge, Tensor):
            ridge = torch.full((), ridge, dtype=torch.float64, device=weight.device)
        _pcg(weight, target, gram, keep, ridge, iterations)


def mean_diagonal(gram: Float[Tensor, "I I"]) -> Float[Tensor, ""]:
    """Return the mean diagonal of G, the unit of damping, in float64.

    It is 1 if all inputs are dead. Otherwise dead inputs do not count: any value for them would
    change the damping of quiet inputs.
    """
    diagonal = gram.diagonal()
    alive = diagonal.count_nonzero()
    return torch.where(alive == 0, 1, diagonal.sum() / alive).double()


def pcg_reference(
    target: Float[Tensor, "O I"],
    gram: Float[Tensor, "I I"],
    keep: Bool[Tensor, "O I"],
    ridge: float = 0.0,
) -> Float[Tensor, "O I"]:
    """Return the exact minimum, row by row from the normal equations.

    Args:
        target: W.
        gram: G, both triangles.
        keep: Support.
        ridge: λ.
    """
    damped = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    result = torch.zeros_like(target)
    for row, support, best in zip(target, keep, result, strict=True):
        best[support] = torch.linalg.solve(damped[support][:, support], (damped @ row)[support])
    return result


@torch.library.custom_op("prunekit::pcg", mutates_args=("weight",))
def _pcg(
    weight: Tensor, target: Tensor, gram: Tensor, keep: Tensor, ridge: Tensor, iterations: int
) -> None:
    # As numbers: multiplying takes a tenth of the time of a masked fill.
    support = keep.to(weight.dtype, memory_format=torch.contiguous_format)
    inverse = (gram.diagonal() + ridge).reciprocal()
    # Without a ridge the weight of a dead input does not change the error.
    inverse.masked_fill_(~inverse.isfinite(), 0)
    with full_precision():
        direction = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        torch.sub(target, weight, out=direction)
        residual = _product(direction, gram, ridge, torch.empty_like(direction)).mul_(support)
        torch.mul(residual, inverse, out=direction)
        energy = _dot(residual, direction)
        product = torch.empty_like(direction)
        for _ in range(iterations):
            _product(direction, gram, ridge, product).mul_(support)
            step = _ratio(energy, _dot(direction, product))
            weight.addcmul_(direction, step)
            residual.addcmul_(product, step, value=-1)
            torch.mul(residual, inverse, out=product)
            before, energy = energy, _dot(residual, product)
            direction.mul_(_ratio(energy, before)).add_(product)


@_pcg.register_fake
def _(
    weight: Tensor, target: Tensor, gram: Tensor, keep: Tensor, ridge: Tensor, iterations: int
) -> None:
    pass


def _product(direction: Tensor, gram: Tensor, ridge: Tensor, out: Tensor) -> Tensor:
    """Return P (G + λI), in ``out``."""
    if not is_remote(ridge.device):
        return out.copy_(direction).addmm_(direction, gram, beta=float(ridge))
    # A number of the host would be needed before the GPU has it.
    return torch.mm(direction, gram, out=out).addcmul_(direction, ridge.to(out.dtype))


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of each row with its counterpart, [O, 1]."""
    return torch.einsum("oi,oi->o", left, right).unsqueeze(1)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Divide; 0 where the divisor is not positive: that row has converged."""
    return torch.where(below > 0, above / below, 0)
