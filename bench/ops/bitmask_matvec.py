"""Bitmask product for few tokens: bound by reading the compressed weight.

Each call takes the next of several weights, so that no cache still holds it.
"""

from collections.abc import Iterator
from itertools import cycle

import torch
from prunekit_kernels import Bitmask, bitmask_matvec, compress_bitmask, expand_bitmask

from bench.harness.measure import Case
from bench.ops.sparse24_matmul import COLD_BYTES, CPU, CUDA, WHY

__all__ = ["WHY", "cases"]


def cases(device: torch.device) -> Iterator[Case]:
    """Yield real layers at two sparsities, with as many tokens as decoding."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    for name, outputs, inputs in CUDA if cuda else CPU:
        for sparsity in (0.5, 0.7):
            weight = torch.randn(outputs, inputs, device=device)
            weight = (weight * (torch.rand_like(weight) >= sparsity)).to(dtype)
            for tokens in (1, 16):
                x = torch.randn(tokens, inputs, device=device).to(dtype)
                yield _case(f"{name} {sparsity:.0%} M={tokens}", x, weight)


def _case(name: str, x: torch.Tensor, weight: torch.Tensor) -> Case:
    outputs, inputs = weight.shape
    copies = max(1, min(16, COLD_BYTES // weight.nbytes)) if x.is_cuda else 1
    dense = cycle([weight.clone() for _ in range(copies)])
    parts = compress_bitmask(weight)
    packed = cycle([Bitmask(*map(torch.clone, parts)) for _ in range(copies)])
    return Case(
        name,
        {"T": len(x), "O": outputs, "I": inputs},
        x.dtype,
        bytes=sum(part.nbytes for part in parts) + x.nbytes + len(x) * outputs * x.itemsize,
        flops=2 * len(x) * parts.values.numel(),
        contestants={
            "prunekit": lambda: bitmask_matvec(x, next(packed)),
            "expanded, then dense": lambda: x @ expand_bitmask(next(packed), inputs).T,
            "dense": lambda: x @ next(dense).T,
        },
    )
