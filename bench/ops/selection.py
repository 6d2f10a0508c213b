"""Selection from given scores: bound by reading them, writing a mask."""

from collections.abc import Iterator

import torch
from prunekit_kernels import Groups, choose

from bench.harness.layers import linears
from bench.harness.measure import Case, compiled

WHY = {
    "cpu": "a partition for the exact k-th value, or for n:m the m - 1 comparisons of planes, are"
    " passes over cache, where a copy is one.",
}


def cases(device: torch.device) -> Iterator[Case]:
    """Yield real layers with each pattern."""
    for name, (outputs, inputs) in linears(device.type).items():
        score = torch.rand(outputs, inputs, device=device)
        for text, groups in (
            ("row", Groups(1, None, (inputs // 2,))),
            ("layer", Groups(None, None, (score.numel() // 2,))),
            ("2:4", Groups(1, 4, (2,))),
        ):
            yield _case(f"{name} {text}", score, groups)


def _case(name: str, score: torch.Tensor, groups: Groups) -> Case:
    outputs, inputs = score.shape
    group = score.numel() if groups.rows is None else groups.columns or inputs
    fast = compiled(_topk)
    return Case(
        name,
        {"O": outputs, "I": inputs},
        score.dtype,
        bytes=score.nbytes + score.numel(),
        flops=0,
        contestants={
            "prunekit": lambda: choose(score, groups),
            "sort": lambda: _sort(score, group),
            "topk": lambda: _topk(score, group),
            "torch.compile": lambda: fast(score, group),
        },
    )


def _topk(score: torch.Tensor, group: int) -> torch.Tensor:
    flat = score.reshape(-1, group)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    highest = flat.topk(group - group // 2, dim=1).indices
    return mask.scatter_(1, highest, True).view_as(score)  # noqa: FBT003


def _sort(score: torch.Tensor, group: int) -> torch.Tensor:
    flat = score.reshape(-1, group)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    highest = flat.argsort(dim=1, descending=True, stable=True)[:, : group - group // 2]
    return mask.scatter_(1, highest, True).view_as(score)  # noqa: FBT003
