"""Score, gate and remove units."""
