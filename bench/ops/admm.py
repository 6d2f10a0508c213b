"""ADMM: bound by one matrix product per iteration.

Ten penalties take one inverse each. The projection keeps half of every row; its time counts.
"""

from collections.abc import Iterator

import torch
from prunekit_kernels import Groups, admm, mean_diagonal, mirror, project, unit_scale
from torch import Tensor

from bench.harness.measure import Case

WHY = {
    "cpu": "a projection every iteration reads and writes two matrices of the weight's size and"
    " finds a threshold in each row, which the floor does not count; the narrower the layer, the"
    " more that is beside its product.",
}
ITERATIONS, EVERY = 30, 3
PENALTIES = [0.1 * 20 ** (step // EVERY / 9) for step in range(ITERATIONS)]
LAYERS = [
    ("smollm2-135m.gate_proj", 1536, 576),
    ("smollm2-135m.down_proj", 576, 1536),
    ("llama-1b.k_proj", 512, 2048),
]


def cases(device: torch.device) -> Iterator[Case]:
    """Yield real layers, pruned to half."""
    for name, outputs, inputs in LAYERS:
        x = torch.randn(2 * inputs, inputs, device=device)
        gram = mirror(x.T @ x)
        scale = unit_scale(gram, 0.001 * mean_diagonal(gram))
        target = torch.randn(outputs, inputs, device=device) * scale
        yield Case(
            name,
            {"O": outputs, "I": inputs},
            target.dtype,
            bytes=2 * target.nbytes + gram.nbytes,
            flops=2 * ITERATIONS * outputs * inputs**2 + ITERATIONS // EVERY * inputs**3,
            contestants={
                "prunekit": lambda given=(target, gram, scale): admm(*given, half, PENALTIES),
                "one eigendecomposition": lambda given=(target, gram, scale): _eigen(*given),
            },
        )


def half(x: Tensor, dual: Tensor) -> None:
    """Keep the higher half of each row of x + dual."""
    project(x, dual, 1.0, Groups(1, None, (x.shape[1] // 2,)), x)


def _eigen(target: Tensor, gram: Tensor, scale: Tensor) -> Tensor:
    """Do the same with one eigendecomposition, as published for ALPS."""
    values, vectors = torch.linalg.eigh(gram / scale / scale[:, None])
    solution, dual = target.clone(), torch.zeros_like(target)
    half(solution, dual)
    dual.zero_()
    before, inverse = 0.0, gram
    for penalty in PENALTIES:
        if penalty != before:
            inverse = (vectors / (values + penalty)) @ vectors.T
            dual *= before / penalty
            before = penalty
        difference = solution - dual - target
        torch.addmm(target, difference, inverse, alpha=penalty, out=solution)
        half(solution, dual)
    return solution
