"""Prefetching: the next block is fetched, and errors reach the waiting thread."""

import pytest
import torch

from prunekit.checkpoint.reader import Checkpoint, open_checkpoint
from prunekit.models.sequential.prefetch import Fetch
from prunekit.models.sequential.weights import Weights
from prunekit.runs.sparsify.run import run
from tests.support import checkpoints
from tests.support.checkpoints import planned

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("else")])
def test_what_goes_wrong_while_a_block_is_fetched_is_said_by_who_waits(llama, monkeypatch, error):
    """After an out-of-memory error, tensors are read when they are needed."""

    def warm(*_):
        raise error

    monkeypatch.setattr(Checkpoint, "warm_page_cache", warm)
    fetch = Fetch(open_checkpoint(llama), [], CPU, lambda _: None)
    fetch.start()
    fetch.join()  # pytest reports an uncaught exception in a thread as an error
    if isinstance(error, torch.OutOfMemoryError):
        assert fetch.take() == {}
        return
    with pytest.raises(RuntimeError, match="else"):
        fetch.take()


def test_the_next_block_is_fetched_while_one_is_visited(llama, tmp_path, monkeypatch):
    fetched, real = [], Weights.fetch

    def fetch(self, module):
        fetched.append(self._prefixes[module])
        real(self, module)

    monkeypatch.setattr(Weights, "fetch", fetch)
    [*run(planned(llama, tmp_path / "out", calibration=None, prune={"method": "magnitude"}))]
    assert fetched[:2] == ["model.layers.1", "model.layers.2"]
