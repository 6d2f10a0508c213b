"""Peaks of a GPU: copies, matrix products, factorisations.

    python -m bench.harness.peaks FILE

Every estimate and floor rests on these. On a CPU the sizes are small, to try the script.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench.harness.measure import describe, peak_copy_rate, seconds


def peaks(device: torch.device) -> Iterator[tuple[str, float]]:
    """Yield the name and value of each peak: bytes, operations, or seconds."""
    yield "copy_bytes_per_second", peak_copy_rate(device)
    size = 8192 if device.type == "cuda" else 256
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
        square = torch.randn(size, size, device=device).to(dtype)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        taken = _median(lambda square=square: square @ square, device)
        torch.backends.cuda.matmul.allow_tf32 = before
        name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
        yield f"{name}_products_per_second", 2 * size**3 / taken
    for inputs in (4096, 11008) if device.type == "cuda" else (128,):
        x = torch.randn(inputs, inputs, device=device)
        gram = (x @ x.T).div_(inputs)
        gram.diagonal().add_(1)
        lower = torch.linalg.cholesky(gram)
        for name, run in {
            "cholesky": lambda gram=gram: torch.linalg.cholesky_ex(gram),
            "cholesky_inverse": lambda lower=lower: torch.cholesky_inverse(lower),
            "triangular_solve": lambda lower=lower, x=x: torch.linalg.solve_triangular(
                lower, x, upper=False
            ),
        }.items():
            yield f"{name}_{inputs}_seconds", _median(run, device)


def _median(run: Callable[[], object], device: torch.device) -> float:
    return statistics.median(seconds(run, device))


if __name__ == "__main__":
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, object] = {"machine": describe(where)}
    for key, value in peaks(where):
        found[key] = value
        print(f"{key:32} {value:.4g}", flush=True)
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
