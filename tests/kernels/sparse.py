"""Weights that are sparse in the ways compressed formats meet them."""

import torch


def two_of_four(outputs, inputs, dtype=torch.float32, device="cpu", *, empty=0.1):
    """Return a 2:4 weight, some of whose groups have one non-zero or none."""
    score = torch.rand(outputs, inputs // 4, 4, device=device)
    keep = score >= score.sort(2).values[..., 2:3]
    keep &= torch.rand(score.shape, device=device) >= empty
    weight = torch.randn(outputs, inputs, device=device).abs() + 0.1
    return (weight * keep.flatten(1)).to(dtype)


def unstructured(outputs, inputs, dtype=torch.float32, device="cpu", sparsity=0.5):
    """Return a weight with an empty row and a full one, if it has two."""
    keep = torch.rand(outputs, inputs, device=device) >= sparsity
    keep[:1], keep[1:2] = False, True
    return ((torch.randn(outputs, inputs, device=device).abs() + 0.1) * keep).to(dtype)
