"""The tolerance rule of kernel tests."""

import torch
from torch import Tensor


def assert_close(actual: Tensor, exact: Tensor, plain: Tensor, *, slack: float = 2.0) -> None:
    """Assert that a kernel's error is at most ``slack`` times PyTorch's.

    ``exact`` is float64; ``plain`` is the reference in the kernel's own precision.
    """
    assert actual.shape == exact.shape
    assert actual.isfinite().all(), "kernel left NaN or inf"
    if not exact.numel():
        return
    scale = exact.abs().max()
    floor = 8 * torch.finfo(plain.dtype).eps * scale  # eight rounding errors of the largest entry
    error, allowed = (actual - exact).abs().max(), slack * (plain - exact).abs().max() + floor
    assert error <= allowed, f"error {error:.3g} > allowed {allowed:.3g} (scale {scale:.3g})"
