"""Perplexity, generated text, and proof of written checkpoints."""
