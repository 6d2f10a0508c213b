"""APT score: outlier-aware salience of the input units of a linear layer.

    S = (Σ|h|) (Σ|g|) + √Kurt

over the columns of a unit: one column for a neuron, ``head_dim`` for a head. The paper (eq. 5) and
the released code differ; both are available. The released code takes Kurt of the weights, each
column times its mean activation; it is excess kurtosis by the unbiased deviation, and at least 0.
The paper takes Kurt of the activations.

Source: Zhao et al., APT, eq. 5, arXiv:2401.12200, and its code, github.com/ROIM1998/APT.
Shapes: I columns, U = I / width units.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit_kernels.salience import merge_moments, new_state, salience

Product = Literal["sums", "calls", "elements"]


def weight_moments(weight: Float[Tensor, "O I"]) -> Float[Tensor, "10 I"]:
    """Return the state of a weight's columns, with its rows as tokens."""
    state = new_state(weight.shape[1], weight.device)
    salience(weight, None, state)
    return state


def apt_score(
    state: Float[Tensor, "10 I"],
    weight: Float[Tensor, "10 I"] | None,
    *,
    width: int = 1,
    product: Product = "calls",
    excess: bool = True,
    clamp: bool = True,
) -> Float[Tensor, " U"]:
    """Return the score of each unit, float64; higher is kept.

    Args:
        state: State of :func:`salience` for the layer's input and its gradient.
        weight: From :func:`weight_moments`, for the kurtosis of the weights as released; None for
            that of the activations, as in the paper.
        width: Columns of a unit.
        product: "calls": Σ|h| · Σ|g| of each call, summed, as released. "sums": of all calls
            together, as eq. 5. "elements": Σ|h g|, as the paper's list of steps has it.
        excess: Subtract 3, the kurtosis of a normal distribution, and use the unbiased deviation.
        clamp: Replace a negative excess by 0; otherwise it is an error.

    Raises:
        ValueError: Widths do not match, or a kurtosis is negative and must not be clamped.
    """
    columns = state.shape[1]
    if columns % width or (weight is not None and weight.shape != state.shape):
        raise ValueError(
            f"{columns} columns are not units of {width}, or the weight's moments have another"
            f" shape: {None if weight is None else tuple(weight.shape)}"
        )
    products = {"calls": state[9], "sums": state[5] * state[6], "elements": state[7]}
    found = products[product].unflatten(0, (-1, width)).sum(1)
    scaled = state if weight is None else _scaled(weight, state[1])
    kurtosis = _kurtosis(_together(scaled[:5], width), excess=excess)
    if clamp:
        kurtosis = kurtosis.clamp_min(0)
    elif (kurtosis < 0).any():
        raise ValueError(
            "excess kurtosis is negative for some units; clamp it or take excess=False"
        )
    return found + kurtosis.sqrt()


def _scaled(moments: Tensor, factor: Tensor) -> Tensor:
    """Return the moments of columns times a factor each."""
    return moments[:5] * torch.stack([factor**power for power in range(5)])


def _together(moments: Tensor, width: int) -> Tensor:
    """Merge the moments of every ``width`` neighbouring columns."""
    columns = moments.unflatten(1, (-1, width)).unbind(2)
    merged = columns[0]
    for column in columns[1:]:
        merged = torch.stack(merge_moments(*merged, *column))
    return merged


def _kurtosis(moments: Tensor, *, excess: bool) -> Tensor:
    """Return M₄ n / M₂², and 0 for constant columns.

    With ``excess``: by the unbiased deviation, minus 3.
    """
    count, _, m2, _, m4 = moments
    varies = m2 > 0
    kurtosis = count * m4 / m2.where(varies, 1).square()
    if excess:
        kurtosis = kurtosis * ((count - 1) / count.clamp_min(1)).square() - 3
    return kurtosis.where(varies, 0)
