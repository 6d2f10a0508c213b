"""Safetensors checkpoints: read, checked, written atomically."""
