"""Score and mask: bound by reading and writing a weight once.

``published`` is Wanda's code: the scores, then a sort of each row or of all, or a `topk` of every m
columns; for tiles the sums, sorted. Each run works on a fresh weight; copying it is not timed.
"""

from collections.abc import Callable, Iterator

import torch
from prunekit_kernels import Groups, score_and_mask

from bench.harness.layers import LINEAR, linears
from bench.harness.measure import Case, compiled

WHY = {
    "cpu": "a partition for the exact k-th value, or for n:m the m - 1 comparisons of planes, are"
    " passes over cache, and so are scoring, zeroing and packing; the sums of tiles are in float64."
}
BIG = "llama2-7b.down_proj"  # on a CPU only the cases that finish within seconds
Published = Callable[[torch.Tensor, torch.Tensor], None]


def cases(device: torch.device) -> Iterator[Case]:
    """Yield real layers with each pattern."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, (outputs, inputs) in (linears(device.type) | {BIG: LINEAR[BIG]}).items():
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        scale = torch.rand(inputs, device=device)
        some = device.type == "cpu" and name == BIG
        for text, groups, published in (
            ("row", Groups(1, None, (inputs // 2,)), _by_row),
            ("2:4", Groups(1, 4, (2,)), lambda *given: _by_neighbours(4, *given)),
            ("4:8", Groups(1, 8, (4,)), lambda *given: _by_neighbours(8, *given)),
            ("layer", Groups(None, None, (weight.numel() // 2,)), _by_layer),
            ("block 16x16", Groups(None, None, (weight.numel() // 512,), (16, 16)), _by_block),
            ("column", Groups(None, None, (inputs // 2,), (outputs, 1)), _by_column),
        ):
            if not (some and text == "layer"):
                # Compiling loops over columns would take hours.
                fast = None if some or ":" in text else compiled(published)
                yield _case(f"{name} {text}", weight, scale, groups, published, fast)


def _case(
    name: str,
    weight: torch.Tensor,
    scale: torch.Tensor,
    groups: Groups,
    published: Published,
    fast: Published | None,
) -> Case:
    outputs, inputs = weight.shape
    work = weight.clone()
    contestants: dict[str, Callable[[], object]] = {
        "prunekit": lambda: score_and_mask(work, groups, scale),
        "published": lambda: published(work, scale),
    }
    if fast is not None:
        contestants["torch.compile"] = lambda: fast(work, scale)
    return Case(
        name,
        {"O": outputs, "I": inputs},
        weight.dtype,
        bytes=2 * weight.nbytes + weight.numel() // 8 + scale.nbytes,
        flops=0,
        contestants=contestants,
        prepare=lambda: work.copy_(weight),
    )


def _by_row(weight: torch.Tensor, scale: torch.Tensor) -> None:
    metric = weight.abs() * scale
    mask = torch.zeros_like(metric, dtype=torch.bool)
    lowest = torch.sort(metric, dim=-1, stable=True)[1][:, : weight.shape[1] // 2]
    weight[mask.scatter_(1, lowest, True)] = 0  # noqa: FBT003


def _by_layer(weight: torch.Tensor, scale: torch.Tensor) -> None:
    metric = weight.abs() * scale
    threshold = torch.sort(metric.flatten())[0][weight.numel() // 2]
    weight[metric <= threshold] = 0


def _by_neighbours(m: int, weight: torch.Tensor, scale: torch.Tensor) -> None:
    metric = weight.abs() * scale
    mask = torch.zeros_like(metric, dtype=torch.bool)
    for start in range(0, weight.shape[1], m):
        lowest = torch.topk(metric[:, start : start + m], m // 2, dim=1, largest=False)[1]
        mask.scatter_(1, start + lowest, True)  # noqa: FBT003
    weight[mask] = 0


def _by_block(weight: torch.Tensor, scale: torch.Tensor) -> None:
    _by_tile(weight, scale, 16, 16)


def _by_column(weight: torch.Tensor, scale: torch.Tensor) -> None:
    _by_tile(weight, scale, weight.shape[0], 1)


def _by_tile(weight: torch.Tensor, scale: torch.Tensor, height: int, width: int) -> None:
    metric = weight.abs() * scale
    total = metric.unflatten(0, (-1, height)).unflatten(2, (-1, width)).sum((1, 3))
    lowest = total.flatten().sort(stable=True)[1][: total.numel() // 2]
    pruned = torch.zeros(total.numel(), dtype=torch.bool, device=weight.device)
    pruned = pruned.index_fill(0, lowest, True).view_as(total)  # noqa: FBT003
    weight[pruned.repeat_interleave(height, 0).repeat_interleave(width, 1)] = 0
