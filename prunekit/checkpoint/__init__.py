"""Safetensors checkpoints: reading, validation, atomic writing, compressed storage."""
