"""2:4 expansion: bound by reading compressed, writing dense weights."""

from collections.abc import Iterator

import torch
from prunekit_kernels import compress24, expand24
from prunekit_kernels.sparse24 import expand24_reference

from bench.harness.measure import Case

LAYERS = [("smollm2-135m.gate_proj", 1536, 576), ("llama-8b.q_proj", 4096, 4096)]


def cases(device: torch.device) -> Iterator[Case]:
    """Yield real layers in bfloat16."""
    for name, outputs, inputs in LAYERS:
        weight = torch.randn(outputs, inputs, device=device)
        keep = weight.abs().unflatten(1, (-1, 4)).argsort(2).argsort(2) >= 2
        weight = (weight * keep.flatten(1)).bfloat16()
        parts = compress24(weight)
        yield Case(
            name,
            {"O": outputs, "I": inputs},
            weight.dtype,
            bytes=sum(part.nbytes for part in parts) + weight.nbytes,
            flops=0,
            contestants={
                "prunekit": lambda parts=parts: expand24(*parts),
                "reference": lambda parts=parts: expand24_reference(*parts),
            },
        )
