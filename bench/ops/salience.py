"""Salience: bound by reading activations and gradients once.

``published`` is APT's released code: the two sums, and the kurtosis separately.
"""

from collections.abc import Iterator

import torch
from prunekit_kernels import new_state, salience
from prunekit_kernels.salience import salience_reference

from bench.harness.measure import Case, compiled

WHY = {
    "cpu": "its nine sums take 14 passes over H or G, squares and products written out between"
    " them; with a C++ compiler at hand `torch.compile` fuses such a chain."
}
CPU = [("smollm2-135m.down_proj", 2048, 1536)]
CUDA = [("llama2-7b.down_proj", 16384, 11008), ("llama3-8b.down_proj", 16384, 14336)]


def cases(device: torch.device) -> Iterator[Case]:
    """Yield the inputs of real layers, in both float types."""
    for name, tokens, columns in CUDA if device.type == "cuda" else CPU:
        for dtype in (torch.float32, torch.bfloat16):
            h, g = torch.randn(2, tokens, columns, device=device).to(dtype)
            yield _case(name, h, g)


def _case(name: str, h: torch.Tensor, g: torch.Tensor) -> Case:
    state = new_state(h.shape[1], h.device)
    fast = compiled(_published)
    return Case(
        name,
        {"T": h.shape[0], "F": h.shape[1]},
        h.dtype,
        bytes=2 * h.nbytes,
        flops=0,
        contestants={
            "prunekit": lambda: salience(h, g, state),
            "reference": lambda: salience_reference(h, g),
            "published": lambda: _published(h, g),
            "torch.compile": lambda: fast(h, g),
        },
    )


def _published(h: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    h, g = h.float(), g.float()
    standard = (h - h.mean(0)) / h.std(0)
    kurtosis = (standard**4).mean(0) - 3
    return h.abs().sum(0) * g.abs().sum(0) + kurtosis.clamp_min(0).sqrt()
