"""TODO-DOC prunekit/evaluation/inspect.py (out of prunekit/verify.py)."""

from pathlib import Path
from typing import Any

from torch import Tensor

from prunekit.checkpoint.reader import open_checkpoint

GROUPS = ((1, 8), (1, 4), (2, 8), (2, 4), (4, 8), (8, 16), (16, 32))
"""The n:m that ``inspect`` looks for: the sparsest first, among equals the shortest."""


def inspect(path: str | Path) -> list[dict[str, Any]]:
    """Return what is known of every floating matrix without running the model.

    That is name, shape, type, sparsity, n:m, and the format: dense, or how it is compressed.
    """
    from prunekit.checkpoint.hub import find

    checkpoint = open_checkpoint(find(str(path)))
    found = []
    for name, entry in checkpoint.entries.items():
        if entry.dtype.is_floating_point and len(entry.shape) >= 2:
            tensor, packed = checkpoint.read([name])[name], checkpoint.packed.get(name)
            zeros = tensor.numel() - int(tensor.count_nonzero())
            found.append(
                {
                    "name": name,
                    "shape": list(entry.shape),
                    "dtype": str(entry.dtype).removeprefix("torch."),
                    "sparsity": zeros / max(tensor.numel(), 1),
                    "n_of_m": _groups(tensor) if zeros else None,
                    "format": packed.format.name if packed else "dense",
                }
            )
    return found


def _groups(tensor: Tensor) -> str | None:
    """Return the first n:m that every group keeps, in a matrix stored outputs first."""
    kept = tensor != 0
    for n, m in GROUPS:
        if kept.shape[-1] % m == 0 and int(kept.unflatten(-1, (-1, m)).sum(-1).max()) <= n:
            return f"{n}:{m}"
    return None
