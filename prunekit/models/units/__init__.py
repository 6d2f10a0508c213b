"""Heads, neurons, hidden dimensions and blocks, and their removal."""
