"""Transformers models: built empty, filled, run block by block."""
