"""Fixtures for all tests.

Kernels run in one of three ways, each in a process of its own: interpreted (``TRITON_INTERPRET=1
pytest tests/kernels``, which this file never sets by itself, since every other test would then
crawl), compiled (on a CUDA device), or compiled ahead of time (``tests/aot``).
"""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

import pytest  # noqa: E402
import torch  # noqa: E402

if INTERPRETED:
    from tests.support import interpreter

    interpreter.install()

ROOT = Path(__file__).parents[1]
NO_DEVICE = "no CUDA device"
NOT_INTERPRETED = "Triton kernels need a CUDA device or TRITON_INTERPRET=1"


def pytest_collection_modifyitems(items):
    cuda = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not cuda:
            item.add_marker(pytest.mark.skip(reason=NO_DEVICE))
        if item.get_closest_marker("interpret") and not (cuda or INTERPRETED):
            item.add_marker(pytest.mark.skip(reason=NOT_INTERPRETED))


@pytest.fixture
def device() -> torch.device:
    """Where tensors of a test live: CUDA where there is one, and the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and texts beside the checkout; tests that need it skip without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared is absent")
    return folder
