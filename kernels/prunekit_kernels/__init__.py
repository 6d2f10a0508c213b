"""Pruning operations on tensors: Triton on CUDA, vectorised PyTorch elsewhere."""

from prunekit_kernels.admm import (
    COMMON,
    FLOOR,
    admm,
    common_share,
    damped_inverse,
    own_scale,
    unit_scale,
)
from prunekit_kernels.apt_score import apt_score, weight_moments
from prunekit_kernels.attention_entropy import attention_entropy
from prunekit_kernels.bitmask import Bitmask, compress_bitmask, expand_bitmask
from prunekit_kernels.bitmask_matvec import bitmask_matvec
from prunekit_kernels.column_energy import column_energy
from prunekit_kernels.fragments24 import from_fragments, has_fragments, to_fragments
from prunekit_kernels.gram import cross_gram, gram, mirror
from prunekit_kernels.grid import Grid, codes, grid_scales, nearest, spread
from prunekit_kernels.grid_descent import grid_descent
from prunekit_kernels.groups import Groups
from prunekit_kernels.inverse_factor import Factor, cholesky, dampings, inverse_factor
from prunekit_kernels.obs_block import NOfM, Sweep, obs_block
from prunekit_kernels.obs_sweep import obs_sweep
from prunekit_kernels.packed_mask import apply, apply_all, pack, popcount, unpack
from prunekit_kernels.pcg import mean_diagonal, pcg
from prunekit_kernels.pending import Pending, to_host, value_of
from prunekit_kernels.probability_entropy import Entropy, probability_entropy
from prunekit_kernels.project import project
from prunekit_kernels.salience import merge, new_state, salience
from prunekit_kernels.score_and_mask import score_and_mask
from prunekit_kernels.selection import choose
from prunekit_kernels.selection_sharded import PeerRows, choose_spread
from prunekit_kernels.sparse24 import Sparse24, compress24, count_broken24, expand24
from prunekit_kernels.sparse24_matmul import sparse24_matmul
from prunekit_kernels.sparse24_mma import sparse24_mma

__all__ = [
    "COMMON",
    "FLOOR",
    "Bitmask",
    "Entropy",
    "Factor",
    "Grid",
    "Groups",
    "NOfM",
    "PeerRows",
    "Pending",
    "Sparse24",
    "Sweep",
    "admm",
    "apply",
    "apply_all",
    "apt_score",
    "attention_entropy",
    "bitmask_matvec",
    "cholesky",
    "choose",
    "choose_spread",
    "codes",
    "column_energy",
    "common_share",
    "compress24",
    "compress_bitmask",
    "count_broken24",
    "cross_gram",
    "damped_inverse",
    "dampings",
    "expand24",
    "expand_bitmask",
    "from_fragments",
    "gram",
    "grid_descent",
    "grid_scales",
    "has_fragments",
    "inverse_factor",
    "mean_diagonal",
    "merge",
    "mirror",
    "nearest",
    "new_state",
    "obs_block",
    "obs_sweep",
    "own_scale",
    "pack",
    "pcg",
    "popcount",
    "probability_entropy",
    "project",
    "salience",
    "score_and_mask",
    "sparse24_matmul",
    "sparse24_mma",
    "spread",
    "to_fragments",
    "to_host",
    "unit_scale",
    "unpack",
    "value_of",
    "weight_moments",
]
