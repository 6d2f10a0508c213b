"""Calibration and evaluation text and its tokenization."""
