"""Benches of perplexity over methods."""
