"""Perplexity, generation speed and text quality, and verification of checkpoints."""
