"""Precision of float32 matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SEARCH = "tf32"
"""Precision of float32 products of a GPU whose errors the caller makes up for: "tf32" or "ieee"."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Disable TF32 and bfloat16 in float32 matrix products.

    The caller's settings are restored at the end.
    """
    with _products("ieee", "ieee"):
        yield


@contextmanager
def search_precision() -> Iterator[None]:
    """Let float32 matrix products of a GPU have the precision :data:`SEARCH`.

    TF32 rounds operands to 11 bits and sums in float32. Products of a CPU remain exact.
    """
    with _products(SEARCH, "ieee"):
        yield


@contextmanager
def _products(gpu: str, cpu: str) -> Iterator[None]:
    switches = _switches(gpu, cpu)
    before = [getattr(module, name) for module, name, _ in switches]
    for module, name, wanted in switches:
        setattr(module, name, wanted)
    try:
        yield
    finally:
        for (module, name, _), value in zip(switches, before, strict=True):
            setattr(module, name, value)


def _switches(gpu: str, cpu: str) -> list[tuple[object, str, object]]:
    # torch 2.9 replaced `allow_tf32`; reading the old name raises once the new one is set.
    if hasattr(torch.backends, "fp32_precision"):
        modules = ((torch.backends.cuda.matmul, gpu), (torch.backends.mkldnn.matmul, cpu))  # pyright: ignore
        return [(module, "fp32_precision", wanted) for module, wanted in modules]
    return [(torch.backends.cuda.matmul, "allow_tf32", gpu == "tf32")]


def dot_precision() -> str:
    """Return the input precision of float32 products in kernels.

    Three TF32 products carry 22 bits, close to float32's 24, and run on tensor cores; plain float32
    ("ieee") would run on the few general units. AMD has no such TF32. Float16 and bfloat16 ignore
    it.
    """
    return "ieee" if torch.version.hip else "tf32x3"
