"""Fixtures of tests that prune tiny models."""

import pytest
import torch

from prunekit.models.sequential import pipeline


@pytest.fixture
def ids():
    return torch.randint(3, 60, (6, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small_batches(monkeypatch):
    """Split samples into several batches, the last one smaller."""
    monkeypatch.setitem(pipeline.BATCH_TOKENS, "cpu", 36)
