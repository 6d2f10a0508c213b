"""Scores of units, with one block of weights in memory."""
