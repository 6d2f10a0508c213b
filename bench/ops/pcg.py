"""PCG: bound by one matrix product per iteration, plus one."""

from collections.abc import Iterator

import torch
from prunekit_kernels import mirror, pcg

from bench.harness.measure import Case

ITERATIONS = 10
LAYERS = [
    ("smollm2-135m.gate_proj", 1536, 576),
    ("smollm2-135m.down_proj", 576, 1536),
    ("llama-7b.q_proj", 4096, 4096),
]


def cases(device: torch.device) -> Iterator[Case]:
    """Yield real layers, pruned to half."""
    for name, outputs, inputs in LAYERS:
        x = torch.randn(2 * inputs, inputs, device=device)
        gram, target = mirror(x.T @ x), torch.randn(outputs, inputs, device=device)
        keep = torch.rand_like(target) > 0.5
        yield _case(name, target, gram, keep)


def _case(name: str, target: torch.Tensor, gram: torch.Tensor, keep: torch.Tensor) -> Case:
    outputs, inputs = target.shape
    product = torch.empty_like(target)

    def products() -> None:
        for _ in range(ITERATIONS + 1):
            torch.mm(target, gram, out=product)

    return Case(
        name,
        {"O": outputs, "I": inputs},
        target.dtype,
        bytes=3 * target.nbytes + gram.nbytes,
        flops=(ITERATIONS + 1) * 2 * outputs * inputs * inputs,
        contestants={
            "prunekit": lambda: pcg(target * keep, target, gram, keep, iterations=ITERATIONS),
            "its products alone": products,
        },
    )
