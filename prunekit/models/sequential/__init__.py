"""Run a model block by block with one block of weights in memory."""
