"""Fixture of all kernel tests: poisoned uninitialised memory."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill new memory with NaN, or an integer that is no result."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(allocate):
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)  # noqa: FBT003
        whole = not tensor.is_floating_point()
        return tensor.fill_(torch.iinfo(tensor.dtype).max - 1 if whole else float("nan"))

    return poisoned
