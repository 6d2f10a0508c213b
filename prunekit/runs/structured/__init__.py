"""Runs that remove whole units."""
