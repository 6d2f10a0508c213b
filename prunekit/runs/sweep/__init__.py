"""Several runs of one model, carried out and compared."""
