"""The arithmetic of pruning on plain tensors: Triton on CUDA, vectorised PyTorch elsewhere."""

from prunekit_kernels.column_energy import column_energy
from prunekit_kernels.gram import gram, mirror
from prunekit_kernels.inverse_factor import Factor, inverse_factor
from prunekit_kernels.obs_sweep import obs_sweep

__all__ = ["Factor", "column_energy", "gram", "inverse_factor", "mirror", "obs_sweep"]
