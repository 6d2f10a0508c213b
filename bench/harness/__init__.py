"""Shared parts of benchmarks: timing, tables, layer shapes, environment."""
