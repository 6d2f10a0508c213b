"""Score and mask: bound by reading a weight and writing it with its bits.

``published`` is what the code of Wanda does: the scores, then a sort of each row, or a `topk` of
every m columns. Each run works on a fresh copy, and the time of that copy is counted.
"""

from collections.abc import Callable, Iterator

import torch
from prunekit_kernels import Groups, score_and_mask

from bench.harness import Case, compiled
from bench.layers import linears


def cases(device: torch.device) -> Iterator[Case]:
    """Yield real layers with each pattern."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, (outputs, inputs) in linears(device.type).items():
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        scale = torch.rand(inputs, device=device)
        for text, groups, published in (
            ("row", Groups(1, None, (inputs // 2,)), _by_row),
            ("layer", Groups(None, None, (weight.numel() // 2,)), _by_layer),
            ("2:4", Groups(1, 4, (2,)), _by_four),
            ("4:8", Groups(1, 8, (4,)), None),
        ):
            yield _case(f"{name} {text}", weight, scale, groups, published)


def _case(
    name: str,
    weight: torch.Tensor,
    scale: torch.Tensor,
    groups: Groups,
    published: Callable[[torch.Tensor, torch.Tensor], None] | None,
) -> Case:
    outputs, inputs = weight.shape
    contestants: dict[str, Callable[[], object]] = {
        "prunekit": lambda: score_and_mask(weight.clone(), groups, scale)
    }
    if published is not None:
        contestants["published"] = lambda: published(weight.clone(), scale)
    if groups.columns is None and published is not None:  # a loop over columns never compiles
        fast = compiled(published)
        contestants["torch.compile"] = lambda: fast(weight.clone(), scale)
    return Case(
        name,
        {"O": outputs, "I": inputs},
        weight.dtype,
        # The copy, then one read and one write, and the bits.
        bytes=4 * weight.nbytes + weight.numel() // 8 + scale.nbytes,
        flops=0,
        contestants=contestants,
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


def _by_four(weight: torch.Tensor, scale: torch.Tensor) -> None:
    metric = weight.abs() * scale
    mask = torch.zeros_like(metric, dtype=torch.bool)
    for start in range(0, weight.shape[1], 4):
        lowest = torch.topk(metric[:, start : start + 4], 2, dim=1, largest=False)[1]
        mask.scatter_(1, start + lowest, True)  # noqa: FBT003
    weight[mask] = 0
