"""Fixtures for tests that run blocks of tiny models."""

import pytest
import torch


@pytest.fixture
def ids():
    ids = torch.randint(3, 60, (5, 11), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 2  # the EOS token, which T5's classification head requires
    return ids
