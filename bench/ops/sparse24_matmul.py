"""2:4 product: bound by reading the weight, or by multiplying.

Few tokens are bound by reading the compressed weight, many by multiplying. Each call takes the next
of several weights, so that no cache still holds it.
"""

from collections.abc import Iterator
from functools import cache
from itertools import cycle

import torch
from prunekit_kernels import (
    Sparse24,
    compress24,
    expand24,
    has_fragments,
    sparse24_matmul,
    sparse24_mma,
    to_fragments,
)
from torch.nn.functional import linear
from torch.sparse import to_sparse_semi_structured

from bench.harness.measure import Case

WHY = {
    "cpu": "at every call the weight is expanded to as many bytes as a dense one has, one weight"
    " after another, and then multiplied.",
}
CPU = [("smollm2-135m.gate_proj", 1536, 576), ("llama-1b.q_proj", 2048, 2048)]
CUDA = [
    ("llama-7b.q_proj", 4096, 4096),
    ("llama-7b.down_proj", 4096, 11008),
    ("llama-70b.down_proj", 8192, 28672),
]
COLD_BYTES = 2**28


def cases(device: torch.device) -> Iterator[Case]:
    """Yield real layers with the tokens of decoding, batches and prompts."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    for name, outputs, inputs in CUDA if cuda else CPU:
        weight = torch.randn(outputs, inputs, device=device)
        keep = weight.abs().unflatten(1, (-1, 4)).argsort(2).argsort(2) >= 2
        weight = (weight * keep.flatten(1)).to(dtype)
        for tokens in (1, 16, 64, 256, 4096) if cuda else (1, 128):
            yield case(name, torch.randn(tokens, inputs, device=device).to(dtype), weight)


def case(name: str, x: torch.Tensor, weight: torch.Tensor) -> Case:
    """Return the product of one layer."""
    outputs, inputs = weight.shape
    copies = max(1, min(16, COLD_BYTES // weight.nbytes)) if x.is_cuda else 1
    dense = cycle([weight.clone() for _ in range(copies)])
    compressed = compress24(weight)
    rows = cycle([Sparse24(*map(torch.clone, compressed)) for _ in range(copies)])
    contestants = {
        "prunekit": lambda: sparse24_matmul(x, *next(rows)),
        "expanded, then dense": lambda: x @ expand24(*next(rows)).T,
        "dense": lambda: x @ next(dense).T,
    }
    if x.is_cuda and has_fragments(outputs, inputs, x.dtype):
        fragments = cycle([to_fragments(compressed) for _ in range(copies)])
        mma = {"prunekit mma.sp": lambda: sparse24_mma(x, *next(fragments))}
        contestants = mma | contestants
    if x.is_cuda:
        # Made at the first call, so that where PyTorch cannot only this contestant fails.
        made = cache(lambda: [to_sparse_semi_structured(weight) for _ in range(copies)])
        turn = cycle(range(copies))
        contestants["cuSPARSELt or CUTLASS"] = lambda: linear(x, made()[next(turn)])
    return Case(
        f"{name} M={len(x)}",
        {"T": len(x), "O": outputs, "I": inputs},
        x.dtype,
        bytes=sum(part.nbytes for part in compressed) + x.nbytes + len(x) * outputs * x.itemsize,
        flops=len(x) * outputs * inputs,  # half of dense
        contestants=contestants,
    )
