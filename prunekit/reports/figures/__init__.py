"""Figures of reports as inline SVG."""
