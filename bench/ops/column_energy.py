"""Column energy: bound by reading the inputs once."""

from collections.abc import Iterator

import torch
from prunekit_kernels import column_energy
from prunekit_kernels.column_energy import column_energy_reference

from bench.harness.measure import Case, compiled

WHY = {
    "cpu": "it squares into a temporary in cache and sums that: two more passes, and of bfloat16"
    " a third that widens."
}
CPU = [("smollm2-135m.q_proj", 2048, 576), ("llama3-8b.q_proj", 2048, 4096)]
CUDA = [("llama3-8b.q_proj", 16384, 4096), ("llama3-8b.down_proj", 16384, 14336)]


def cases(device: torch.device) -> Iterator[Case]:
    """Yield the inputs of real layers, in both float types."""
    for name, tokens, inputs in CUDA if device.type == "cuda" else CPU:
        for dtype in (torch.float32, torch.bfloat16):
            yield _case(name, torch.randn(tokens, inputs, device=device).to(dtype))


def _case(name: str, x: torch.Tensor) -> Case:
    tokens, inputs = x.shape
    out = torch.zeros(inputs, device=x.device)
    fast = compiled(column_energy_reference)
    return Case(
        name,
        {"T": tokens, "I": inputs},
        x.dtype,
        bytes=x.nbytes + 2 * out.nbytes,
        flops=0,
        contestants={
            "prunekit": lambda: column_energy(x, out),
            "reference": lambda: out.add_(column_energy_reference(x)),
            "torch.compile": lambda: out.add_(fast(x)),
            "vector_norm": lambda: torch.linalg.vector_norm(x, dim=0, dtype=torch.float32),
        },
    )
