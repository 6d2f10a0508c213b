import pytest
import torch
from prunekit_kernels import _counters
from prunekit_kernels._counters import constant, zeroed


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(_counters, "_zeros", {})
    monkeypatch.setattr(_counters, "_constants", {})


def test_zeros_are_kept_and_grow(device):
    with zeroed(5, device) as first:
        assert not first.any()
        with zeroed(5, device) as inner:  # in use, so another
            assert inner.data_ptr() != first.data_ptr()
    with zeroed(3, device) as again:
        assert again.data_ptr() == first.data_ptr()
    with zeroed(9, device) as larger:
        assert len(larger) == 9


def fail_midway(device):
    with zeroed(5, device) as counts:
        counts.fill_(1)
        raise ValueError("midway")


def test_after_an_error_they_are_not_kept(device):
    with pytest.raises(ValueError, match="midway"):
        fail_midway(device)
    with zeroed(5, device) as counts:
        assert not counts.any()


def test_very_many_are_not_kept(device, monkeypatch):
    monkeypatch.setattr(_counters, "LARGEST", 4)
    with zeroed(5, device):
        pass
    assert not _counters._zeros


def test_counts_are_made_once(device, monkeypatch):
    monkeypatch.setattr(_counters, "CONSTANTS", 2)
    found = constant((3, 3, -1, 7), device)
    assert found.tolist() == [3, 3, 0, 7]
    assert found.dtype == torch.int64
    assert constant((3, 3, -1, 7), device) is found
    for number in range(2):
        constant((number,), device)
    assert constant((3, 3, -1, 7), device) is not found
    assert len(_counters._constants) == 2


@pytest.mark.gpu
def test_a_selection_is_captured_in_a_graph(device):
    from prunekit_kernels import Groups, choose

    score = torch.randn(512, 384, device=device)
    groups = Groups(None, 128, (30000, 30001, 30002))
    choose(score, groups)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = choose(score, groups)
    for _ in range(3):
        score.copy_(torch.randn(score.shape))
        graph.replay()
        assert torch.equal(keep, choose(score.clone(), groups))
