"""Set weights to zero, block by block."""
