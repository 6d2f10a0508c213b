"""The arithmetic of pruning on plain tensors: Triton on CUDA, vectorised PyTorch elsewhere."""

from prunekit_kernels.admm import admm, unit_scale
from prunekit_kernels.column_energy import column_energy
from prunekit_kernels.gram import gram, mirror
from prunekit_kernels.inverse_factor import Factor, inverse_factor
from prunekit_kernels.obs_block import NOfM, Sweep, obs_block
from prunekit_kernels.obs_sweep import obs_sweep
from prunekit_kernels.pcg import mean_diagonal, pcg

__all__ = [
    "Factor",
    "NOfM",
    "Sweep",
    "admm",
    "column_energy",
    "gram",
    "inverse_factor",
    "mean_diagonal",
    "mirror",
    "obs_block",
    "obs_sweep",
    "pcg",
    "unit_scale",
]
