"""The arithmetic of pruning on plain tensors: Triton on CUDA, vectorised PyTorch elsewhere."""

from prunekit_kernels.bitmask import Bitmask, compress_bitmask, expand_bitmask
from prunekit_kernels.bitmask_matvec import bitmask_matvec
from prunekit_kernels.column_energy import column_energy
from prunekit_kernels.fragments24 import from_fragments, has_fragments, to_fragments
from prunekit_kernels.gram import gram, mirror
from prunekit_kernels.inverse_factor import Factor, inverse_factor
from prunekit_kernels.keep_bits import pack_bits, unpack_bits
from prunekit_kernels.obs_sweep import obs_sweep
from prunekit_kernels.sparse24 import Sparse24, compress24, expand24
from prunekit_kernels.sparse24_matmul import sparse24_matmul
from prunekit_kernels.sparse24_mma import sparse24_mma

__all__ = [
    "Bitmask",
    "Factor",
    "Sparse24",
    "bitmask_matvec",
    "column_energy",
    "compress24",
    "compress_bitmask",
    "expand24",
    "expand_bitmask",
    "from_fragments",
    "gram",
    "has_fragments",
    "inverse_factor",
    "mirror",
    "obs_sweep",
    "pack_bits",
    "sparse24_matmul",
    "sparse24_mma",
    "to_fragments",
    "unpack_bits",
]
