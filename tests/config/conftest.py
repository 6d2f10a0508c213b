"""Fixtures of configs."""

from tests.support.configs import load, mistakes  # noqa: F401
