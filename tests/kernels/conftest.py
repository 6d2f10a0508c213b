"""What every kernel test has: uninitialised memory that cannot pass for a result."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill what ``torch.empty`` returns with NaN."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(allocate):
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return poisoned
