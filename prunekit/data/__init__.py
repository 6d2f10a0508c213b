"""Calibration and evaluation text, and its tokens."""
