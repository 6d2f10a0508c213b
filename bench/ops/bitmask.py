"""Bitmask expansion: bound by reading compressed, writing dense weights."""

from collections.abc import Iterator

import torch
from prunekit_kernels import compress_bitmask, expand_bitmask
from prunekit_kernels.bitmask import expand_bitmask_reference

from bench.harness.measure import Case

LAYERS = [("smollm2-135m.gate_proj", 1536, 576), ("llama-8b.q_proj", 4096, 4096)]


def cases(device: torch.device) -> Iterator[Case]:
    """Yield real layers in bfloat16, half of them zeros."""
    for name, outputs, inputs in LAYERS:
        weight = torch.randn(outputs, inputs, device=device)
        weight = (weight * (torch.rand_like(weight) > 0.5)).bfloat16()
        parts = compress_bitmask(weight)
        yield Case(
            name,
            {"O": outputs, "I": inputs},
            weight.dtype,
            bytes=sum(part.nbytes for part in parts) + weight.nbytes,
            flops=0,
            contestants={
                "prunekit": lambda parts=parts, i=inputs: expand_bitmask(parts, i),
                "reference": lambda parts=parts, i=inputs: expand_bitmask_reference(*parts[:2], i),
            },
        )
