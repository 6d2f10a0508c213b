import pytest

from tests.distributed.fork_server import ForkServer


@pytest.fixture(scope="session")
def fork_server():
    """A process from which worlds of ranks are forked."""
    made = ForkServer()
    yield made
    made.close()
