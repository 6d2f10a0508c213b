"""Low-rank adapters that make up for pruned weights.

With E = W − W′ the weight lost by pruning and H = XᵀX of the inputs, ‖(E − BA)X‖² is least over
products of rank r for B = U, A = UᵀE, where U holds the first r eigenvectors of E H Eᵀ: those of
EoRA (Liu et al., arXiv:2410.21271), which projects onto the eigenspace of H, found here without a
square root or an inverse of H.

Shapes: O output features, I input features.
"""

from functools import partial

import torch
from jaxtyping import Float
from prunekit_kernels import to_host
from torch import Tensor

from prunekit.checkpoint.adapter import Adapter
from prunekit.models.orientation import weight_matrix
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.sparsify.error import relative_error
from prunekit.sparsify.row_sharding import ShardedLinear
from prunekit.statistics import Gram, StageStatistics

ITERATIONS, SPARE = 8, 16
"""Of subspace iteration for the eigenvectors: steps, and vectors beyond the rank."""


def low_rank_factors(lost: Float[Tensor, "O I"], gram: Float[Tensor, "I I"], rank: int) -> Adapter:
    """Return the product BA of a rank that minimises ‖(E − BA)X‖².

    Args:
        lost: E, float32.
        gram: H, float32, both triangles.
        rank: Rank of the product; at most the number of rows and of columns.
    """
    outputs, inputs = lost.shape
    rank = min(rank, outputs, inputs)
    seed = torch.Generator().manual_seed(0)
    basis = torch.randn(outputs, min(rank + SPARE, outputs), generator=seed).to(lost)
    weighed = lost @ gram
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(weighed @ (lost.T @ basis)).Q
    small = (basis.T @ weighed) @ (lost.T @ basis)
    up = basis @ torch.linalg.eigh((small + small.T) / 2).eigenvectors[:, -rank:]
    return Adapter(up, up.T @ lost)


@torch.no_grad()
def adapt(
    loaded: LoadedBlock,
    shard: ShardedLinear,
    weights: tuple[Tensor, Tensor],
    stats: StageStatistics,
    rank: int,
    dtype: torch.dtype,
) -> tuple[Adapter, float | None]:
    """Add an adapter to a pruned linear; measure the error left.

    Args:
        loaded: The block, changed in place.
        shard: The linear, and its rows that this rank prunes.
        weights: The weight that pruning aimed at, and the dense one: these rows, float32.
        stats: Statistics of the inputs.
        rank: Rank of the adapter.
        dtype: Type in which it is stored.

    Returns:
        The adapter, on the CPU, and the relative error with it; of a GPU both pending.
    """
    target, dense = weights
    found = low_rank_factors(shard.gather(target - shard.read(loaded)), stats[Gram].full, rank)
    adapter = Adapter(found.up.to(dtype), found.down.to(dtype))
    weight = weight_matrix(loaded.module.get_submodule(shard.linear.path))
    weight.add_(adapter.product.to(weight.device))
    error = relative_error(dense, shard.read(loaded), stats, shard.sharing)
    # Both in one tensor, so that they arrive together.
    both = torch.cat([adapter.up.T, adapter.down], 1)
    return to_host(both, partial(_split, outputs=len(adapter.up))), error


def _split(both: Tensor, outputs: int) -> Adapter:
    up, down = both.split([outputs, both.shape[1] - outputs], 1)
    return Adapter(up.T.contiguous(), down.contiguous())
