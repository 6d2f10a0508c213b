"""Sparse weights as compressed formats store them."""

import torch


def two_of_four(outputs, inputs, dtype=torch.float32, device="cpu", *, empty=0.1):
    """Return a 2:4 weight, with some emptier groups."""
    score = torch.rand(outputs, inputs // 4, 4, device=device)
    keep = score >= score.sort(2).values[..., 2:3]
    keep &= torch.rand(score.shape, device=device) >= empty
    weight = torch.randn(outputs, inputs, device=device).abs() + 0.1
    return (weight * keep.flatten(1)).to(dtype)


def unstructured(outputs, inputs, dtype=torch.float32, device="cpu", sparsity=0.5):
    """Return a sparse weight; its first row is empty, its second full."""
    keep = torch.rand(outputs, inputs, device=device) >= sparsity
    keep[:1], keep[1:2] = False, True
    return ((torch.randn(outputs, inputs, device=device).abs() + 0.1) * keep).to(dtype)


def surrounded(values):
    """Return values within a larger buffer of NaN, which shows reads outside."""
    canvas = values.new_full((len(values) + 512,), torch.nan)
    canvas[256:-256] = values
    return canvas[256:-256]


HOSTILE = {
    "negative": lambda offsets: offsets - 7,
    "beyond": lambda offsets: offsets + 7,
    "far below": lambda offsets: torch.full_like(offsets, -(2**63)),
    "far beyond": lambda offsets: torch.full_like(offsets, 2**63 - 1),
    "reversed": lambda offsets: offsets.flip(0),
    "at the end": lambda offsets: torch.full_like(offsets, int(offsets[-1])),
}
"""Row offsets that no loaded layer has, but a kernel may be given."""
