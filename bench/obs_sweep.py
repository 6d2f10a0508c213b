"""OBS sweep: bound by matrix products; the published code by touching memory column by column.

Each run works on a fresh copy of the weight, and the time of that copy is counted.
"""

from collections.abc import Iterator

import torch
from prunekit_kernels import inverse_factor, mirror, obs_sweep
from prunekit_kernels.obs_sweep import obs_sweep_reference

from bench.harness import Case

LAYERS = [
    ("smollm2-135m.gate_proj", 1536, 576),
    ("smollm2-135m.down_proj", 576, 1536),
    ("llama-8b.q_proj", 4096, 4096),
]


def cases(device: torch.device) -> Iterator[Case]:
    """Yield real layers, 2:4 and with a mask given beforehand."""
    for name, outputs, inputs in LAYERS:
        x = torch.randn(2 * inputs, inputs, device=device)
        upper = inverse_factor(mirror(x.T @ x), 0.01).upper
        weight = torch.randn(outputs, inputs, device=device)
        yield _case(f"{name} 2:4", weight, upper, 4)
        yield _case(f"{name} given", weight, upper, None)


def _case(name: str, weight: torch.Tensor, upper: torch.Tensor, stride: int | None) -> Case:
    outputs, inputs = weight.shape
    given = torch.rand_like(weight) > 0.5
    choose = _two_of_four if stride else lambda _, start: given[:, start : start + 128]
    return Case(
        name,
        {"O": outputs, "I": inputs},
        weight.dtype,
        bytes=2 * weight.nbytes + upper.nbytes // 2,
        flops=outputs * inputs * inputs,
        contestants={
            "prunekit": lambda: obs_sweep(weight.clone(), upper, choose, stride),
            "published": lambda: obs_sweep_reference(weight.clone(), upper, choose, stride),
        },
    )


def _two_of_four(score: torch.Tensor, start: int) -> torch.Tensor:  # noqa: ARG001  a choose
    third = score.unflatten(1, (-1, 4)).sort(dim=2, descending=True).values[..., 1:2]
    return (score.unflatten(1, (-1, 4)) >= third).flatten(1)
