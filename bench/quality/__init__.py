"""Benchmarks of perplexity by method."""
