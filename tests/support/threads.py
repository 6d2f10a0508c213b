"""Ranks as threads of one process, for tests of collective operations."""

import threading
from concurrent.futures import ThreadPoolExecutor

from prunekit.distributed.ranks import Ranks

PATIENCE = 30
"""Seconds after which a rank waiting for another fails."""


class ThreadRanks(Ranks):
    """One of several ranks that exchange values through a shared list."""

    def __init__(self, rank, size, board, barrier):
        super().__init__(rank, size)
        self._board, self._barrier = board, barrier

    def _exchange(self, value):
        self._board[self.rank] = value
        self._barrier.wait(PATIENCE)
        values = [*self._board]
        self._barrier.wait(PATIENCE)
        return values

    def run_on_main(self, work, leader=0):
        value, error = None, None
        if self.rank == leader:
            try:
                value = work()
            except Exception as raised:
                error = raised
        value, error = self._exchange((value, error))[leader]
        if error:
            raise error
        return value

    def broadcast(self, owner, panels, what):
        panels = [*panels]
        sent = self._exchange([panel.clone() for panel in panels])[owner]
        for panel, value in zip(panels, sent, strict=True):
            panel.copy_(value)

    def all_gather_object(self, value):
        return self._exchange(value)

    def all_reduce_sum(self, tensor, what):
        values = self._exchange(tensor.clone())
        tensor.copy_(sum(values[1:], values[0]))


def on_ranks(size, work):
    """Run ``work(ranks)`` on all ranks concurrently and return the results."""
    board, barrier = [None] * size, threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        started = [
            pool.submit(work, ThreadRanks(rank, size, board, barrier)) for rank in range(size)
        ]
        return [each.result() for each in started]
