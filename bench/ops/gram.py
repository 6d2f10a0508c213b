"""Gram matrix and cross product: bound by matrix products.

Symmetry saves half of those of the Gram matrix. ``product`` is the vendor's library: on a GPU
bfloat16 products with a float32 result, where available; elsewhere float32.
"""

from collections.abc import Callable, Iterator

import torch
from prunekit_kernels import cross_gram, gram
from prunekit_kernels.gram import gram_reference

from bench.harness.measure import Case, compiled

CPU = [
    ("smollm2-135m.q_proj", 2048, 576),
    ("smollm2-135m.down_proj", 2048, 1536),
    ("llama3-8b.q_proj", 2048, 4096),
]
CUDA = [
    ("smollm2-135m.q_proj", 16384, 576),
    ("llama3-8b.q_proj", 16384, 4096),
    ("llama3-8b.down_proj", 16384, 14336),
]


def cases(device: torch.device) -> Iterator[Case]:
    """Yield the inputs of real layers, in both float types."""
    cuda = device.type == "cuda"
    for name, tokens, inputs in CUDA if cuda else CPU:
        for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
            x, y = torch.randn(2, tokens, inputs, device=device).to(dtype)
            yield _case(name, x)
            if inputs < 10000:
                yield _cross(name, x, y)


def _case(name: str, x: torch.Tensor) -> Case:
    tokens, inputs = x.shape
    out = torch.zeros(inputs, inputs, device=x.device)
    fast = compiled(gram_reference)
    return Case(
        name,
        {"T": tokens, "I": inputs},
        x.dtype,
        bytes=x.nbytes + out.nbytes,
        flops=tokens * inputs * (inputs + 1),
        contestants={
            "prunekit": lambda: gram(x, out),
            "product": _product(x, x, out),
            "published": lambda: out.add_(gram_reference(x)),
            "torch.compile": lambda: out.add_(fast(x)),
        },
    )


def _cross(name: str, x: torch.Tensor, y: torch.Tensor) -> Case:
    tokens, inputs = x.shape
    out = torch.zeros(inputs, inputs, device=x.device)
    return Case(
        f"{name} cross",
        {"T": tokens, "I": inputs},
        x.dtype,
        bytes=2 * (x.nbytes + out.nbytes),
        flops=2 * tokens * inputs**2,
        contestants={
            "prunekit": lambda: cross_gram(x, y, out),
            "product": _product(x, y, out),
        },
    )


def _product(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    if x.is_cuda and x.dtype != torch.float32:
        try:
            torch.mm(x[:16].T, y[:16], out_dtype=torch.float32)
        except (TypeError, RuntimeError):
            pass  # this PyTorch has none
        else:
            return lambda: out.add_(torch.mm(x.T, y, out_dtype=torch.float32))
    return lambda: out.addmm_(x.float().T, y.float())
