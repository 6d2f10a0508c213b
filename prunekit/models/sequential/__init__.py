"""Run a model block by block, one block of weights in memory."""
