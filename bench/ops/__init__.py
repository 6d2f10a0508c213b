"""Benches of kernels, one file an operation."""
