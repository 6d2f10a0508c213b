"""Gradients summed, and weights compared, over ranks.

Many tensors are exchanged in few collectives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Shaped

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.distributed.ranks import Ranks

BUCKET_BYTES = 32 << 20
"""Size of a flat copy of small tensors; larger ones are summed where they are."""
PART = 1 << 20
"""Elements of a tensor that a checksum reads at a time."""
MODULUS = 1 << 63


def sum_over_ranks(tensors: Sequence[Shaped[Tensor, ...]], ranks: Ranks, purpose: str) -> None:
    """All-reduce tensors in place; all ranks get the same bits.

    Args:
        tensors: Tensors of equal shapes and types on all ranks.
        ranks: The ranks that have the other summands.
        purpose: Key under which the traffic is counted.
    """
    import torch

    if not ranks.is_distributed:
        return
    for bucket in _buckets(tensors):
        flat = bucket[0] if len(bucket) == 1 else torch.cat([each.flatten() for each in bucket])
        whole = flat.contiguous()
        ranks.all_reduce_sum(whole, purpose)
        if len(bucket) > 1:
            parts = whole.split([each.numel() for each in bucket])
            for each, part in zip(bucket, parts, strict=True):
                each.copy_(part.view(each.shape))
        elif whole is not flat:
            flat.copy_(whole)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Split tensors into lists of one dtype, device and limited size."""
    kinds: dict[object, list[Tensor]] = {}
    for each in tensors:
        kinds.setdefault((each.dtype, each.device), []).append(each)
    for alike in kinds.values():
        bucket, nbytes = [], 0
        for each in alike:
            if bucket and nbytes + each.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, nbytes = [], 0
            bucket.append(each)
            nbytes += each.nbytes
        yield bucket


def differing(tensors: Mapping[str, Shaped[Tensor, ...]], ranks: Ranks) -> list[str]:
    """Return a line for each tensor that differs between ranks.

    Args:
        tensors: Tensors by name.
        ranks: The ranks that compare theirs.
    """
    if not ranks.is_distributed:
        return []
    return ranks.differences({name: checksum(each) for name, each in tensors.items()})


def checksum(tensor: Shaped[Tensor, ...]) -> int:
    """Return a digest of all bits of a tensor."""
    import torch

    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().flatten().view(kinds[tensor.element_size()])
    total = 0
    for part in flat.split(PART):
        places = torch.arange(1, len(part) + 1, device=part.device)
        total = (total * 31 + int((part * places).sum())) % MODULUS
    return total
