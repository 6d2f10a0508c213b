"""Probability entropy: bound by reading the probabilities once."""

from collections.abc import Iterator

import torch
from prunekit_kernels import probability_entropy
from prunekit_kernels.probability_entropy import probability_entropy_reference

from bench.harness.layers import ATTENTION
from bench.harness.measure import Case, compiled

WHY = {
    "cpu": "it spends its time in log and in four passes, chunk by chunk in cache; with a C++"
    " compiler at hand `torch.compile` fuses them."
}


def cases(device: torch.device) -> Iterator[Case]:
    """Yield the attention of one sequence in real layers."""
    cuda = device.type == "cuda"
    for name in ("smollm2-135m", "llama3-8b") if cuda else ("smollm2-135m",):
        _, heads, _, length, _ = ATTENTION[name]
        p = torch.randn(1, heads, length, length, device=device).softmax(-1)
        for dtype in (torch.float32, torch.bfloat16):
            yield _case(f"{name}.attention", p.to(dtype))


def _case(name: str, p: torch.Tensor) -> Case:
    fast = compiled(_published)
    return Case(
        name,
        {"H": p.shape[1], "S": p.shape[2]},
        p.dtype,
        bytes=p.nbytes,
        flops=0,
        contestants={
            "prunekit": lambda: probability_entropy(p),
            "reference": lambda: probability_entropy_reference(p),
            "published": lambda: _published(p),
            "torch.compile": lambda: fast(p),
        },
    )


def _published(p: torch.Tensor) -> torch.Tensor:
    p = p.float()  # in bfloat16 the small addend would be lost
    return -(p * torch.log(p + 1e-9)).sum(-1).mean((0, 2))
