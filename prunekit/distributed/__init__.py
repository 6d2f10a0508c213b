"""Processes (ranks) that share a run: collectives and failure detection."""
