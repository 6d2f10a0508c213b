"""Benches of pruning while training."""
