"""Score units block by block, with the weights of one block in memory."""
