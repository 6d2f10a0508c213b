"""Random weights for the storage formats."""

import torch
from torch import Tensor

from tests.kernels.sparse import two_of_four, unstructured

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weight_for(
    kind: str, outputs: int, inputs: int, dtype: torch.dtype, empty: float = 0.1
) -> Tensor:
    """Return a random weight that the storage format ``kind`` can represent."""
    if kind == "2:4":
        return two_of_four(outputs, inputs, empty=empty).to(dtype)
    return unstructured(outputs, inputs).to(dtype)
