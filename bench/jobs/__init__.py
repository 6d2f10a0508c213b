"""Benches of whole jobs."""
