"""Selection from scores that are there: bound by reading them and writing a mask."""

from collections.abc import Iterator

import torch
from prunekit_kernels import Groups, choose
from prunekit_kernels.selection import choose_reference

from bench.harness import Case
from bench.layers import linears


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
    kept = inputs - groups.pruned[0] if groups.columns is None else 0
    contestants = {"prunekit": lambda: choose(score, groups)}
    if groups.rows == 1 and groups.columns is None:
        contestants["topk"] = lambda: _topk(score, kept)
    if groups.rows is None:
        contestants["sort"] = lambda: choose_reference(score, groups)
    return Case(
        name,
        {"O": outputs, "I": inputs},
        score.dtype,
        bytes=score.nbytes + score.numel(),
        flops=0,
        contestants=contestants,
    )


def _topk(score: torch.Tensor, kept: int) -> torch.Tensor:
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, score.topk(kept, dim=1).indices, True)  # noqa: FBT003
