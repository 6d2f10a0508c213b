"""A task of lm-eval."""

from tests.support.harness import installed, task_file  # noqa: F401
