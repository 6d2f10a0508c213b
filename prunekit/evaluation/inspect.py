"""Sparsity, pattern and format of the matrices in a checkpoint."""

from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from prunekit.checkpoint.header import FLOAT_DTYPES, TensorEntry
from prunekit.checkpoint.hub import checkpoint_folder
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.models.memory import report_exhausted

GROUPS = ((1, 8), (1, 4), (2, 8), (2, 4), (4, 8), (8, 16), (16, 32))
"""Patterns n:m to look for: sparsest first, then shortest groups first."""


@report_exhausted()
def inspect(path: str | Path) -> list[dict[str, Any]]:
    """Describe every floating-point matrix without running the model.

    Returns:
        One dictionary per matrix: name, shape, dtype, sparsity, ``n_of_m`` (None if no pattern
        holds) and storage format ("dense" or the name of a compressed format).
    """
    checkpoint = open_checkpoint(checkpoint_folder(str(path)))
    matrices = []
    for name, entry in checkpoint.entries.items():
        if _is_matrix(entry):
            tensor, packed = checkpoint.read([name])[name], checkpoint.compressed.get(name)
            if entry.dtype not in FLOAT_DTYPES:
                tensor = tensor.float()  # torch counts no zeros in types of eight bits
            zeros = tensor.numel() - int(tensor.count_nonzero())
            matrices.append(
                {
                    "name": name,
                    "shape": list(entry.shape),
                    "dtype": str(entry.dtype).removeprefix("torch."),
                    "sparsity": zeros / max(tensor.numel(), 1),
                    "n_of_m": _n_of_m(tensor) if zeros else None,
                    "format": packed.format.name if packed else "dense",
                }
            )
    return matrices


def _is_matrix(entry: TensorEntry) -> bool:
    """Return whether a tensor is a matrix of unpacked floating-point numbers."""
    whole = entry.nbytes == prod(entry.shape) * entry.dtype.itemsize
    return entry.dtype.is_floating_point and len(entry.shape) >= 2 and whole


def _n_of_m(tensor: Tensor) -> str | None:
    """Return the first n:m of GROUPS that holds along the last dimension."""
    kept = tensor != 0
    for n, m in GROUPS:
        if kept.shape[-1] % m == 0 and int(kept.unflatten(-1, (-1, m)).sum(-1).max()) <= n:
            return f"{n}:{m}"
    return None
