"""OBS sweep: bound by matrix products.

    python -m bench obs_sweep

The published code is bound by touching memory column by column. Each run works on a fresh copy of
the weight, and the time of that copy counts.
"""

from collections.abc import Iterator

import torch
from prunekit_kernels import Groups, NOfM, choose, inverse_factor, obs_sweep
from torch import Tensor

from bench.harness.measure import Case

WHY = {
    "cpu": "within a block a column is taken from those to come one at a time, at the speed of"
    " cache and not of products, the more so the fewer rows and columns there are; n:m is chosen"
    " between the columns, four at a time.",
}
LAYERS = [
    ("smollm2-135m.gate_proj", 1536, 576),
    ("smollm2-135m.down_proj", 576, 1536),
    ("llama-7b.q_proj", 4096, 4096),
    ("llama-7b.down_proj", 4096, 11008),
]


def cases(device: torch.device) -> Iterator[Case]:
    """Yield real layers, 2:4 and half of each block of 128 columns."""
    for name, outputs, inputs in LAYERS:
        weight, upper = _layer(outputs, inputs, device)
        for choice, m in ((f"{name} 2:4", 4), (f"{name} half", 0)):
            yield Case(
                choice,
                {"O": outputs, "I": inputs},
                weight.dtype,
                bytes=2 * weight.nbytes + upper.nbytes // 2,
                flops=outputs * inputs * inputs,
                contestants=_contestants(weight, upper, m),
            )


def _contestants(weight: Tensor, upper: Tensor, m: int) -> dict:
    way = NOfM(m // 2, m) if m else half
    return {
        "prunekit": lambda: obs_sweep(weight.clone(), upper, way),
        "published": lambda: published(weight.clone(), upper, m),
    }


def published(weight: Tensor, upper: Tensor, m: int) -> None:
    """Sweep by the published loop: prune half of each group or block."""
    for start in range(0, weight.shape[1], 128):
        end = min(start + 128, weight.shape[1])
        columns, factor = weight[:, start:end].clone(), upper[start:end, start:end]
        pruned, errors = torch.zeros_like(columns), torch.zeros_like(columns)
        gone = torch.zeros_like(columns, dtype=torch.bool)
        if not m:
            score = columns**2 / factor.diagonal() ** 2
            gone = score <= score.flatten().sort()[0][score.numel() // 2]
        for j in range(end - start):
            column, root = columns[:, j], factor[j, j]
            if m and j % m == 0:
                score = columns[:, j : j + m] ** 2 / factor.diagonal()[j : j + m] ** 2
                gone.scatter_(1, j + score.topk(m // 2, dim=1, largest=False)[1], True)  # noqa: FBT003
            kept = column.clone()
            kept[gone[:, j]] = 0
            pruned[:, j] = kept
            error = (column - kept) / root
            columns[:, j:] -= error.unsqueeze(1).matmul(factor[j, j:].unsqueeze(0))
            errors[:, j] = error
        weight[:, start:end] = pruned
        weight[:, end:] -= errors.matmul(upper[start:end, end:])


def half(score: Tensor, start: int) -> Tensor:  # noqa: ARG001  a choose
    """Keep the higher half of all scores, as the engine does."""
    return choose(score, Groups(None, None, (score.numel() // 2,)))


def _gram(inputs: int, device: torch.device) -> Tensor:
    x = torch.randn(1024, inputs, device=device)
    gram = x.T @ x
    gram.diagonal().add_(1024)
    return gram


def _layer(outputs: int, inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    weight = torch.randn(outputs, inputs, device=device)
    return weight, inverse_factor(_gram(inputs, device), 0.01).upper
