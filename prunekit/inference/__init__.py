"""Compressed checkpoints in use: layers, loading, conversion, speed."""
