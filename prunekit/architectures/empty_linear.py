"""A linear without inputs or without outputs."""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override


class NoWeight:
    """Weight without elements, which transformers neither initializes nor casts to."""

    _is_hf_initialized: ClassVar[bool] = True


class EmptyLinear(nn.Module):
    """Stand-in for a linear whose inputs or outputs are removed.

    It has no weight, so that no file, optimizer or count of parameters holds one; without inputs
    its output is the bias, or zeros. The output still depends on the input, so that all parameters
    before it have gradients, of zeros.

    Attributes:
        in_features: Number of inputs.
        out_features: Number of outputs; one of both numbers is 0.
        bias: The bias of the outputs, or None.
    """

    weight: ClassVar[NoWeight] = NoWeight()
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", bias)

    @override
    def forward(self, x: Tensor) -> Tensor:
        weight = x.new_empty(self.out_features, self.in_features)
        return functional.linear(x, weight, self.bias)

    @override
    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
