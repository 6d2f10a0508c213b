"""Project: threshold and dual update of an ADMM iteration, in one pass.

    T = X + V / ρ
    D = P(T):  the highest |T| of each group are kept, the others become 0
    V ← V + ρ (X − D) = ρ (T − D):  0 where T is kept, ρT where it is pruned

X and V are read once, D and V are written once.

Source: Meng et al., ALPS, Algorithm 1, arXiv:2406.07831; Boza, arXiv:2401.02938.
Shapes: O output features, I input features, B = ⌈I / 8⌉ bytes.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from prunekit_kernels import _select, _source
from prunekit_kernels._triton import runs_triton
from prunekit_kernels.groups import Groups
from prunekit_kernels.packed_mask import pack, part
from prunekit_kernels.selection import choose_reference, plain, row_chunks


def project(
    x: Float[Tensor, "O I"],
    dual: Float[Tensor, "O I"],
    rho: float,
    groups: Groups,
    out: Float[Tensor, "O I"],
) -> UInt8[Tensor, "O B"]:
    """Write D and the new V; return the packed keep mask.

    Args:
        x: X, float32 (float64 in PyTorch only); any strides, as the others.
        dual: V, changed in place.
        rho: ρ, above 0.
        groups: The groups and their counts.
        out: Receives D; may be ``x`` itself.

    Raises:
        ValueError: Shapes, types, devices or the groups do not match, or ρ is not positive.
    """
    for name, tensor in (("dual", dual), ("out", out)):
        if (tensor.shape, tensor.dtype, tensor.device) != (x.shape, x.dtype, x.device):
            raise ValueError(
                f"{name} must be {x.dtype} of shape {tuple(x.shape)} on {x.device}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )
    if x.dtype not in (torch.float32, torch.float64) or not rho > 0:
        raise ValueError(f"x must be float32 or float64 and rho positive, got {x.dtype} and {rho}")
    groups.check(*x.shape)
    if out is x:  # an operator does not accept the same tensor twice
        return _project_in_place(x, dual, rho, groups.numbers())
    return _project(x, dual, rho, groups.numbers(), out)


def project_reference(
    x: Float[Tensor, "O I"], dual: Float[Tensor, "O I"], rho: float, groups: Groups
) -> tuple[Float[Tensor, "O I"], Float[Tensor, "O I"]]:
    """Return D and the new V, step by step.

    Args:
        x: X.
        dual: V.
        rho: ρ.
        groups: The groups and their counts.
    """
    target = x + dual * (1 / rho)
    projected = target.where(choose_reference(target.abs(), groups), 0)
    return projected, dual + rho * (x - projected)


@torch.library.custom_op("prunekit::project", mutates_args=("dual", "out"))
def _project(x: Tensor, dual: Tensor, rho: float, groups: list[int], out: Tensor) -> Tensor:
    return _run(x, dual, rho, Groups.of(groups), out)


@torch.library.custom_op("prunekit::project_in_place", mutates_args=("x", "dual"))
def _project_in_place(x: Tensor, dual: Tensor, rho: float, groups: list[int]) -> Tensor:
    return _run(x, dual, rho, Groups.of(groups), x)


@_project.register_fake
def _(x: Tensor, dual: Tensor, rho: float, groups: list[int], out: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty((x.shape[0], -(-x.shape[1] // 8)), dtype=torch.uint8)


@_project_in_place.register_fake
def _(x: Tensor, dual: Tensor, rho: float, groups: list[int]) -> Tensor:  # noqa: ARG001
    return x.new_empty((x.shape[0], -(-x.shape[1] // 8)), dtype=torch.uint8)


def _run(x: Tensor, dual: Tensor, rho: float, groups: Groups, out: Tensor) -> Tensor:
    if runs_triton(x) and x.dtype == torch.float32:
        return _select.launch(_source.iterate(x, dual, rho, out), groups)
    bits = torch.empty(x.shape[0], -(-x.shape[1] // 8), dtype=torch.uint8, device=x.device)
    for rows in row_chunks(groups, *x.shape):
        target = dual[rows]
        # Not addcmul, whose fused rounding differs from that of a product and a sum.
        target = (target if rho == 1 else target.mul_(1 / rho)).add_(x[rows])
        keep = plain(target.abs(), groups)
        bits[rows] = pack(keep)
        part(target, keep, out[rows])
        if rho != 1:
            target *= rho
    return bits
