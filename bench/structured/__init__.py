"""Benches of unit pruning."""
