"""The arithmetic of pruning on plain tensors: Triton on CUDA, vectorised PyTorch elsewhere."""

from prunekit_kernels.admm import admm, unit_scale
from prunekit_kernels.apt_score import apt_score, smoothed, weight_moments
from prunekit_kernels.attention_entropy import attention_entropy
from prunekit_kernels.column_energy import column_energy
from prunekit_kernels.gram import cross_gram, gram, mirror
from prunekit_kernels.inverse_factor import Factor, inverse_factor
from prunekit_kernels.obs_block import NOfM, Sweep, obs_block
from prunekit_kernels.obs_sweep import obs_sweep
from prunekit_kernels.packed_mask import apply, pack, popcount, unpack
from prunekit_kernels.pcg import mean_diagonal, pcg
from prunekit_kernels.probability_entropy import Entropy, probability_entropy
from prunekit_kernels.project import project
from prunekit_kernels.salience import merge, new_state, salience
from prunekit_kernels.score_and_mask import score_and_mask
from prunekit_kernels.selection import Groups, choose

__all__ = [
    "Entropy",
    "Factor",
    "Groups",
    "NOfM",
    "Sweep",
    "admm",
    "apply",
    "apt_score",
    "attention_entropy",
    "choose",
    "column_energy",
    "cross_gram",
    "gram",
    "inverse_factor",
    "mean_diagonal",
    "merge",
    "mirror",
    "new_state",
    "obs_block",
    "obs_sweep",
    "pack",
    "pcg",
    "popcount",
    "probability_entropy",
    "project",
    "salience",
    "score_and_mask",
    "smoothed",
    "unit_scale",
    "unpack",
    "weight_moments",
]
