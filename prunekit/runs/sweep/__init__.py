"""Several runs compared side by side."""
