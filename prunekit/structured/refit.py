"""Refit of the linears that read units.

The weights of kept units are fitted to compensate for the removed ones.
With H = XᵀX of such a linear's input X, the best weights of the kept inputs K are
W H_:K (H_KK)⁻¹.

Shapes: T tokens, U units, S inputs of the linear per unit, I inputs in total, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from prunekit_kernels import cholesky, dampings, gram, mirror, value_of
from torch import Tensor

from prunekit.errors import NumericsError
from prunekit.models.adapters import effective_weight
from prunekit.models.orientation import features, weight_matrix
from prunekit.models.units.heads_neurons import LinearUnitGroup
from prunekit.structured.probes.reader_inputs import observe_inputs

PIECE = 1024
"""Rows that are converted to float64 at once."""

if TYPE_CHECKING:
    from prunekit.structured.gated_model import GatedModel


def reader_grams(gated: GatedModel, *, after_gates: bool = True) -> dict[str, Float[Tensor, "I I"]]:
    """Return H of each group's reader, divided by the number of tokens.

    ``after_gates`` as in :func:`prunekit.structured.probes.reader_inputs.observe_inputs`.
    """
    sums: dict[str, Tensor] = {}
    tokens: dict[str, float] = {}

    def observe(group: LinearUnitGroup, x: Float[Tensor, "T I"]) -> None:
        if group.name not in sums:
            sums[group.name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        gram(x, sums[group.name])
        tokens[group.name] = tokens.get(group.name, 0) + len(x)

    observe_inputs(gated, observe, after_gates=after_gates)
    gated.all_reduce_sums(sums.values())
    tokens = gated.all_reduce_counts(tokens)
    return {name: mirror(total).div_(max(tokens[name], 1)) for name, total in sums.items()}


def damped_factor(
    part: Callable[[], Float[Tensor, "C C"]], mean: float, damping: float, name: str
) -> tuple[Float[Tensor, "C C"], float]:
    """Return the Cholesky factor of damped H, and the damping.

    Sums in float32 may leave H indefinite: the damping is then raised tenfold until it suffices.

    Args:
        part: Returns the symmetric part anew, float64 on the CPU; the factor takes its memory.
        mean: Mean diagonal of H.
        damping: Multiple of it that is added to the diagonal.
        name: Name of the linear, for the message.

    Raises:
        NumericsError: H is zero, not finite, or not positive definite with damping 1.
    """
    if not 0 < mean < float("inf"):
        raise NumericsError(
            f"{name}: its inputs have a mean square of {mean}. If all of its units are gated off, "
            "leave it out; otherwise the data makes the model overflow."
        )
    for each in dampings(damping):
        lower = part().T
        lower.diagonal().add_(each * mean)
        if value_of(cholesky(lower)):
            return lower, each
    raise NumericsError(
        f"{name}: the products of its inputs are not positive definite, even with the mean of "
        "their diagonal added to it. Use more calibration text."
    )


def mean_square(total: Float[Tensor, "I I"]) -> float:
    """Return the mean diagonal of H, summed in float64."""
    return float(total.diagonal().double().mean())


def removal_loss(
    group: LinearUnitGroup,
    total: Float[Tensor, "I I"],
    damping: float,
    output_weights: Float[Tensor, "O O"] | None = None,
) -> Float[Tensor, " U"]:
    """Return the reader's output error without each unit, after a refit.

    ``tr(G W_P [(H⁻¹)_PP]⁻¹ W_Pᵀ)`` for the inputs P of the unit, in float64.

    Args:
        group: The group of the units.
        total: H of its reader.
        damping: Multiple of the mean diagonal that is added to the diagonal of H.
        output_weights: G, the weight of each pair of output errors; the identity if None.
    """
    weight = effective_weight(group.reader.linear).double().cpu()
    whole = partial(total.to, "cpu", torch.float64, copy=True)
    inverse = torch.cholesky_inverse(
        damped_factor(whole, mean_square(total), damping, group.name)[0]
    )
    index = group.reader.index.flatten(1)  # [U, S]
    blocks = inverse[index[:, :, None], index[:, None, :]]
    columns = weight[:, index].movedim(1, 0)  # [U, O, S]
    weighted = columns if output_weights is None else output_weights @ columns
    return (torch.linalg.solve(blocks, columns, left=False) * weighted).sum((1, 2))


def removal_flops(group: LinearUnitGroup) -> int:
    """Return the operations of :func:`removal_loss`."""
    outputs, inputs = features(group.reader.linear)
    # Of H a Cholesky factor and its inverse, a solve for each unit, the sums.
    return inputs**3 + 2 * inputs * outputs * (group.features_per_unit + 1)


def removal_bytes(group: LinearUnitGroup) -> int:
    """Return the bytes that :func:`removal_loss` takes, besides H."""
    outputs, inputs = features(group.reader.linear)
    # H and its factor; then its inverse, the weights and five matrices of their size.
    return 8 * (inputs**2 + max(inputs**2, 6 * inputs * outputs))


def refit_flops(group: LinearUnitGroup, kept: float) -> int:
    """Return the operations of :func:`refit` that keeps a fraction of the units."""
    outputs, inputs = features(group.reader.linear)
    columns = kept * inputs
    return int(columns**3 / 3 + 2 * outputs * columns * (inputs + columns))


def refit_bytes(group: LinearUnitGroup, kept: float) -> int:
    """Return the bytes that :func:`refit` takes, besides H."""
    outputs, inputs = features(group.reader.linear)
    columns = int(kept * inputs)
    # The factor of the kept part and the rows that it is made of, of which the heap is not trimmed;
    # the weights, those of kept inputs, and the products.
    rows = min(PIECE, columns) * inputs
    return 8 * (columns**2 + rows + outputs * (inputs + 2 * columns))


@torch.no_grad()
def refit(
    group: LinearUnitGroup, total: Float[Tensor, "I I"], keep: Sequence[int], damping: float = 0.01
) -> None:
    """Change the reader's kept columns, in place, to compensate for the others.

    Its adapters are counted in, and not changed.

    Args:
        group: The group of the units.
        total: H of its reader.
        keep: The kept units; without any nothing is changed.
        damping: Multiple of the mean diagonal that is added to the diagonal of H.

    Raises:
        NumericsError: See :func:`damped_factor`.
    """
    if not keep:
        return
    weight, whole = weight_matrix(group.reader.linear), effective_weight(group.reader.linear)
    columns = group.reader.index[list(keep)].flatten()
    fitted = _fitted(whole.double().cpu(), total.cpu(), columns, damping, group.name)
    columns = columns.to(weight.device)
    weight[:, columns] = (fitted.to(whole.device) - (whole - weight)[:, columns]).to(weight)


def _fitted(
    weight: Float[Tensor, "O I"],
    total: Float[Tensor, "I I"],
    columns: Int[Tensor, " C"],
    damping: float,
    name: str,
) -> Float[Tensor, "O C"]:
    """Return the fitted weights of some inputs, float64 on the CPU."""
    # W (H + λ) without the damping, which is known once the factor is.
    target = _pieces(lambda piece: (weight @ total[:, piece].double()).T, columns, len(weight)).T
    square = partial(_pieces, lambda piece: total[piece][:, columns], columns, len(columns))
    mean = mean_square(total)
    factor, damping = damped_factor(square, mean, damping, name)
    target.add_(weight[:, columns], alpha=damping * mean)
    # In place: `cholesky_solve` copies the factor.
    for triangle, upper in ((factor.T, True), (factor, False)):
        torch.linalg.solve_triangular(triangle, target, upper=upper, left=False, out=target)
    return target


def _pieces(
    rows: Callable[[Int[Tensor, " P"]], Float[Tensor, "P N"]],
    columns: Int[Tensor, " C"],
    width: int,
) -> Float[Tensor, "C N"]:
    """Return a matrix in float64, made some rows at a time."""
    found = torch.empty(len(columns), width, dtype=torch.float64)
    for piece, part in zip(columns.split(PIECE), found.split(PIECE), strict=True):
        part.copy_(rows(piece))
    return found
