"""Benchmarks of kernels, one file per operation."""
