"""Packed mask: bound by writing the weights that go, and reading the bits."""

from collections.abc import Iterator

import torch
from prunekit_kernels import apply, pack, unpack

from bench.harness import Case
from bench.layers import linears


def cases(device: torch.device) -> Iterator[Case]:
    """Yield real layers: applying bits, packing and unpacking them."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, (outputs, inputs) in linears(device.type).items():
        keep = torch.rand(outputs, inputs, device=device) > 0.5
        yield _case(name, torch.randn(outputs, inputs, device=device).to(dtype), keep)


def _case(name: str, weight: torch.Tensor, keep: torch.Tensor) -> Case:
    bits = pack(keep)
    return Case(
        name,
        {"O": weight.shape[0], "I": weight.shape[1]},
        weight.dtype,
        bytes=weight.nbytes // 2 + bits.nbytes,
        flops=0,
        contestants={
            "prunekit": lambda: apply(weight, bits),
            "masked_fill_": lambda: weight.masked_fill_(~keep, 0),
            "pack": lambda: pack(keep),
            "unpack": lambda: unpack(bits, weight.shape[1]),
        },
    )
