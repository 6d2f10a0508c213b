"""Float32 matrix products in full float32 precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Disable TF32 and bfloat16 in float32 matrix products.

    The caller's settings are restored at the end.
    """
    switches = _switches()
    before = [getattr(module, name) for module, name, _ in switches]
    for module, name, exact in switches:
        setattr(module, name, exact)
    try:
        yield
    finally:
        for (module, name, _), value in zip(switches, before, strict=True):
            setattr(module, name, value)


def _switches() -> list[tuple[object, str, object]]:
    # torch 2.9 replaced `allow_tf32`; reading the old name raises once the new one is set.
    if hasattr(torch.backends, "fp32_precision"):
        modules = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore
        return [(module, "fp32_precision", "ieee") for module in modules]
    return [(torch.backends.cuda.matmul, "allow_tf32", False)]


def dot_precision() -> str:
    """Return the input precision of float32 products in kernels.

    Three TF32 products carry 22 bits, close to float32's 24, and run on tensor cores; plain float32
    ("ieee") would run on the few general units. AMD has no such TF32. Float16 and bfloat16 ignore
    it.
    """
    return "ieee" if torch.version.hip else "tf32x3"
