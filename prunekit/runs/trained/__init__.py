"""Runs that prune weights and train the model."""
