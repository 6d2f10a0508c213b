"""Use of compressed checkpoints: sparse layers, loading, conversion, speed."""
