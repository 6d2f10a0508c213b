import pytest

from tests.distributed.nursery import Nursery


@pytest.fixture(scope="session")
def nursery():
    """Give a process from which worlds of ranks are forked."""
    made = Nursery()
    yield made
    made.close()
