"""Runs that set weights to zero, block by block."""
