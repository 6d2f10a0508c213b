"""Looks into a running model, and turns parts of it down, without changing what it computes."""
