"""Sharded selection, with threads as processes: the same as unsharded."""

import importlib
from threading import Barrier, Lock, Thread

import pytest
import torch
from prunekit_kernels import Groups, PeerRows, choose, choose_spread

from tests.kernels.cases import cases


@pytest.fixture(autouse=True)
def one_kernel_at_a_time(monkeypatch):
    """Serialise launches: Triton's interpreter has one grid for all threads."""
    lock = Lock()

    def locked(score, groups):
        with lock:
            return choose(score, groups)

    monkeypatch.setattr(
        importlib.import_module("prunekit_kernels.selection_sharded"), "choose", locked
    )


class Sum:
    """All-reduce by summation over threads, in place."""

    def __init__(self, size):
        self.barrier, self.parts = Barrier(size, timeout=30), [None] * size

    def add(self, rank, tensor):
        self.parts[rank] = tensor.clone()
        self.barrier.wait()
        tensor.copy_(torch.stack(self.parts).sum(0))
        self.barrier.wait()


def spread(score, groups, rows):
    """Return the mask that threads find, each with a number of rows."""
    total, found = Sum(len(rows)), [None] * len(rows)

    def one(rank, part):
        others = PeerRows(rank, len(rows), len(score), lambda counts: total.add(rank, counts))
        found[rank] = choose_spread(part, groups, others)

    threads = [Thread(target=one, args=pair) for pair in enumerate(score.split(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat(found)


def scores(kind, outputs=12, inputs=20):
    generator = torch.Generator().manual_seed(3)
    score = torch.randn(outputs, inputs, generator=generator)
    match kind:
        case "ties":
            return score.round()
        case "all equal":
            return torch.zeros(outputs, inputs)
        case "not numbers":
            score[3, 4:9], score[5, 1], score[7, 2] = torch.nan, torch.inf, -torch.inf
        case "zeros of both signs":
            return torch.where(score > 0, 0.0, -0.0)
    return score


GROUPS = {
    "all": Groups(None, None, (113,)),
    "none of them": Groups(None, None, (0,)),
    "every one": Groups(None, None, (240,)),
    "windows": Groups(None, 8, (40, 0, 33)),
    "rows": Groups(1, None, (7,)),
    "n:m": Groups(1, 4, (2,)),
    "tiles": Groups(None, None, (11,), (2, 5)),
    "columns": Groups(None, None, (9,), (12, 1)),
    "whole rows": Groups(None, None, (5,), (1, 20)),
}
KINDS = ("apart", "ties", "all equal", "not numbers", "zeros of both signs")


SPLITS = {
    "ties, one": ("ties", [12]),
    "ties, two": ("ties", [6, 6]),
    **{kind: (kind, [2, 6, 4]) for kind in KINDS},
}
COMBINED = cases(
    SPLITS,
    GROUPS,
    seldom=lambda split, name: split != "ties, two" and name != "all",
)


@pytest.mark.parametrize(("split", "name"), COMBINED)
def test_what_stays_is_what_stays_of_the_whole(split, name):
    kind, rows = SPLITS[split]
    score = scores(kind)
    assert torch.equal(spread(score, GROUPS[name], rows), choose(score, GROUPS[name]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_are_compared_as_they_are(dtype):
    score = scores("apart").to(dtype)
    assert torch.equal(spread(score, GROUPS["all"], [5, 7]), choose(score, GROUPS["all"]))


def test_groups_that_do_not_divide_the_whole_are_refused():
    others = PeerRows(0, 2, 12, lambda counts: None)
    with pytest.raises(ValueError, match="tiles have to divide"):
        choose_spread(scores("apart")[:6], Groups(None, None, (1,), (5, 5)), others)


def test_sums_of_tiles_are_not_rounded():
    score = torch.full((4, 64), -3e38)
    for row, tile in enumerate((5, 9, 2, 14)):
        score[row, 4 * tile] += 1e32
    groups = Groups(None, None, (60,), (1, 4))
    assert torch.equal(spread(score, groups, [2, 2]), choose(score, groups))


def test_float64_is_compared_as_such():
    score = 1 + 1e-12 * torch.arange(48, dtype=torch.float64).view(6, 8)
    score = torch.cat([score.flip(0), -score])
    groups = Groups(None, None, (70,))
    assert torch.equal(spread(score, groups, [5, 4, 3]), choose(score, groups))
