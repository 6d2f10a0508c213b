"""Runs that train a model under masks, or prune its weights while training."""
