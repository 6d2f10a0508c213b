"""Project: bound by reading X, V and writing D, V once.

``published`` is ALPS's step: a `topk` of all, of each row or of every m neighbours, then the update
of the dual.
"""

from collections.abc import Iterator

import torch
from prunekit_kernels import Groups, project

from bench.harness.layers import linears
from bench.harness.measure import Case, compiled

RHO = 1.3
WHY = {
    "cpu": "a partition for the exact k-th value, or for n:m the m - 1 comparisons of planes, are"
    " passes over cache, where a copy is one.",
}


def cases(device: torch.device) -> Iterator[Case]:
    """Yield real layers with each pattern."""
    for name, (outputs, inputs) in linears(device.type).items():
        x, dual = torch.randn(2, outputs, inputs, device=device)
        for text, groups in (
            ("row", Groups(1, None, (inputs // 2,))),
            ("layer", Groups(None, None, (x.numel() // 2,))),
            ("2:4", Groups(1, 4, (2,))),
        ):
            yield _case(f"{name} {text}", x, dual, groups)


def _case(name: str, x: torch.Tensor, dual: torch.Tensor, groups: Groups) -> Case:
    outputs, inputs = x.shape
    out = torch.empty_like(x)
    group = x.numel() if groups.rows is None else groups.columns or inputs
    fast = compiled(_published)
    return Case(
        name,
        {"O": outputs, "I": inputs},
        x.dtype,
        bytes=4 * x.nbytes + x.numel() // 8,
        flops=0,
        contestants={
            "prunekit": lambda: project(x, dual, RHO, groups, out),
            "published": lambda: _published(x, dual, group),
            "torch.compile": lambda: fast(x, dual, group),
        },
    )


def _published(x: torch.Tensor, dual: torch.Tensor, group: int) -> None:
    target = x + dual / RHO
    flat = target.reshape(-1, group)
    lowest = torch.topk(flat.abs(), group // 2, dim=1, largest=False).indices
    projected = flat.clone().scatter_(1, lowest, 0).view_as(x)
    dual += RHO * (x - projected)
