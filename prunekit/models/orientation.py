"""Orientation of linear weights: GPT-2's ``Conv1D`` stores [inputs, outputs].

Everything else in prunekit sees the weight of a linear as [outputs, inputs]. The weight of a linear
with adapters of peft is that of the linear alone.

Shapes: O output features, I input features.
"""

from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunekit.architectures.adapters import base_layer
from prunekit.architectures.empty_linear import EmptyLinear


def stored_transposed(linear: nn.Module) -> bool:
    """Return whether the weight is stored inputs first."""
    return isinstance(base_layer(linear), Conv1D)


def outputs_first(linear: nn.Module, value: Tensor) -> Float[Tensor, "O I"]:
    """Return a view, outputs first, of a tensor stored like the weight.

    The converse is the same operation, so this also turns [O, I] into the stored layout.
    """
    return value.T if stored_transposed(linear) else value


def weight_matrix(linear: nn.Module) -> Float[Tensor, "O I"]:
    """Return a view of the weight, outputs first."""
    return outputs_first(linear, cast("Tensor", linear.weight))


def features(linear: nn.Module) -> tuple[int, int]:
    """Return the number of output and of input features."""
    if isinstance(linear, EmptyLinear):
        return linear.out_features, linear.in_features
    outputs, inputs = weight_matrix(linear).shape
    return outputs, inputs


def stored_axis(linear: nn.Module, axis: int) -> int:
    """Return the stored axis of the outputs (0) or the inputs (1)."""
    return 1 - axis if stored_transposed(linear) else axis


def update_features(linear: Any) -> None:  # noqa: ANN401  attributes differ by class
    """Set the module's feature counts to the shape of its weight."""
    if isinstance(linear, Conv1D):
        linear.nx, linear.nf = linear.weight.shape
    else:
        linear.out_features, linear.in_features = features(linear)
