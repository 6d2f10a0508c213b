"""Gram matrix: bound by matrix products, half of which symmetry saves."""

from collections.abc import Iterator

import torch
from prunekit_kernels import gram
from prunekit_kernels.gram import gram_reference

from bench.harness import Case

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
            yield _case(name, torch.randn(tokens, inputs, device=device).to(dtype))


def _case(name: str, x: torch.Tensor) -> Case:
    tokens, inputs = x.shape
    out = torch.zeros(inputs, inputs, device=x.device)
    return Case(
        name,
        {"T": tokens, "I": inputs},
        x.dtype,
        bytes=x.nbytes + out.nbytes,
        flops=tokens * inputs * (inputs + 1),
        contestants={
            "prunekit": lambda: gram(x, out),
            "float32 addmm": lambda: out.addmm_(x.float().T, x.float()),
            "published": lambda: out.add_(gram_reference(x)),
        },
    )
