"""Typed configs from TOML files, with an error message per line."""
