"""Project: bound by reading X and V and writing D and V once.

``published`` is ALPS's step: a `topk` of all, then the update of the dual.
"""

from collections.abc import Iterator

import torch
from prunekit_kernels import Groups, project

from bench.harness import Case
from bench.layers import linears

RHO = 1.3


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
    contestants = {"prunekit": lambda: project(x, dual, RHO, groups, out)}
    if groups.columns is None:
        whole = groups.rows is None
        contestants["published"] = lambda: _published(x, dual, whole=whole)
    return Case(
        name,
        {"O": outputs, "I": inputs},
        x.dtype,
        bytes=4 * x.nbytes + x.numel() // 8,
        flops=0,
        contestants=contestants,
    )


def _published(x: torch.Tensor, dual: torch.Tensor, *, whole: bool) -> None:
    target = x + dual / RHO
    flat = target.reshape(1, -1) if whole else target
    lowest = torch.topk(flat.abs(), flat.shape[1] // 2, dim=1, largest=False).indices
    projected = flat.clone().scatter_(1, lowest, 0).view_as(x)
    dual += RHO * (x - projected)
