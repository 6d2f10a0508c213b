"""Packed mask: bound by bytes.

Applying reads and writes every line of the weight, since zeros are scattered, and reads the bits;
packing reads a byte per weight and writes its bit, and unpacking is the reverse.
"""

from collections.abc import Callable, Iterator

import torch
from prunekit_kernels import apply, pack, unpack

from bench.harness.layers import linears
from bench.harness.measure import Case, compiled

WHY = {
    "cpu": "apply unpacks the bits, spreads each to the size of a weight and then masks: four"
    " passes where a kernel makes one. unpack looks each byte up in a table of words, one after"
    " another."
}


def cases(device: torch.device) -> Iterator[Case]:
    """Yield real layers: applying bits, packing and unpacking them."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, (outputs, inputs) in linears(device.type).items():
        keep = torch.rand(outputs, inputs, device=device) > 0.5
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        bits = pack(keep)
        fill = compiled(_masked)
        yield _case(f"{name} apply", weight, 2 * weight.nbytes + bits.nbytes, {
            "prunekit": lambda weight=weight, bits=bits: apply(weight, bits),
            "masked_fill_": lambda weight=weight, bits=bits: _masked(weight, bits),
            "torch.compile": lambda weight=weight, bits=bits, fill=fill: fill(weight, bits),
        })  # fmt: skip
        spread = compiled(_unpacked)
        yield _case(f"{name} unpack", keep, keep.nbytes + bits.nbytes, {
            "prunekit": lambda bits=bits, inputs=inputs: unpack(bits, inputs),
            "shifts": lambda bits=bits: _unpacked(bits),
            "torch.compile": lambda bits=bits, spread=spread: spread(bits),
        })  # fmt: skip
        gather = compiled(_packed)
        yield _case(f"{name} pack", keep, keep.nbytes + bits.nbytes, {
            "prunekit": lambda keep=keep: pack(keep),
            "shifts": lambda keep=keep: _packed(keep),
            "torch.compile": lambda keep=keep, gather=gather: gather(keep),
        })  # fmt: skip


def _case(
    name: str, x: torch.Tensor, moved: int, contestants: dict[str, Callable[[], object]]
) -> Case:
    shape = {"O": x.shape[0], "I": x.shape[1]}
    return Case(name, shape, x.dtype, bytes=moved, flops=0, contestants=contestants)


def _masked(weight: torch.Tensor, bits: torch.Tensor) -> None:
    weight.masked_fill_(~_unpacked(bits), 0)


def _unpacked(bits: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, :, None] >> shifts & 1).flatten(1).bool()


def _packed(keep: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (keep.unflatten(1, (-1, 8)).to(torch.uint8) << shifts).sum(2, dtype=torch.uint8)
