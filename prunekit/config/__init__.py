"""TOML files to typed configs, with every mistake at its line."""
