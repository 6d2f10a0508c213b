"""Attention entropy: bound by the causal products of queries and keys.

Causality saves half of the products. ``eager`` computes the probabilities, as published code does;
``attention`` is PyTorch's fused attention with values, which takes twice the products.
"""

from collections.abc import Iterator

import torch
from prunekit_kernels import attention_entropy
from prunekit_kernels.attention_entropy import attention_entropy_reference
from torch.nn.functional import scaled_dot_product_attention

from bench.harness.layers import ATTENTION, Attention
from bench.harness.measure import Case, compiled

WHY = {
    "cpu": "it spends its time in exp and in four passes over the scores, chunk by chunk in cache;"
    " the products alone would reach the floor."
}


def cases(device: torch.device) -> Iterator[Case]:
    """Yield causal attention of real layers."""
    cuda = device.type == "cuda"
    for name, layer in ATTENTION.items() if cuda else [("smollm2-135m", ATTENTION["smollm2-135m"])]:
        yield _case(f"{name}.attention", layer, device, torch.bfloat16 if cuda else torch.float32)


def _case(name: str, layer: Attention, device: torch.device, dtype: torch.dtype) -> Case:
    batch, heads, shared, length, size = layer
    q = torch.randn(batch, heads, length, size, device=device).to(dtype)
    k = torch.randn(batch, shared, length, size, device=device).to(dtype)
    fast = compiled(attention_entropy_reference)
    return Case(
        name,
        {"B": batch, "H": heads, "S": length, "D": size},
        dtype,
        bytes=q.nbytes + k.nbytes,
        flops=batch * heads * length * (length + 1) * size,
        contestants={
            "prunekit": lambda: attention_entropy(q, k, causal=True),
            "eager": lambda: attention_entropy_reference(q, k, causal=True),
            "torch.compile": lambda: fast(q, k, causal=True),
            "attention": lambda: scaled_dot_product_attention(
                q, k, k, is_causal=True, enable_gqa=True
            ),
        },
    )
