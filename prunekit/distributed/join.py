"""Join the processes of a launcher into one run.

Launchers are torchrun, accelerate and schedulers.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from prunekit.distributed.heartbeat import RESUME_HINT, Heartbeat
from prunekit.distributed.ranks import SINGLE, Ranks, local_rank
from prunekit.errors import ConfigError, RankError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

COLLECTIVE_TIMEOUT = timedelta(days=30)
"""Timeout of collectives: practically none, as one rank may write or evaluate for long; failures
are detected by :mod:`prunekit.distributed.heartbeat`."""
JOIN_SECONDS = 55.0
"""Time within which all ranks must have joined."""
LISTENER = "PRUNEKIT_LISTENER"
"""Variable with the file descriptor of the socket on which rank 0 is to listen, if it is open."""
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that launchers set."""


def join(device: str = "auto") -> Ranks:
    """Join the ranks that torchrun or accelerate started; return this process's view.

    Args:
        device: Device on which blocks will run, as in a config.

    Raises:
        ConfigError: A variable that describes the ranks is missing or wrong.
        RankError: Not all ranks joined in time, or one failed while connecting.
    """
    rank, size = _rank_and_size()
    if size == 1:
        return SINGLE
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = _connect(rank)
    except RuntimeError as error:
        tried = f"did not reach rank 0 at {address} within {JOIN_SECONDS:.0f} s; it may have died"
        raise RankError(
            f"rank {rank} of {size} {tried if rank else f'cannot listen at {address}'} "
            f"({str(error).splitlines()[0]}). {RESUME_HINT}"
        ) from error
    # Detects failures from here on, including those while the ranks connect to each other.
    heartbeat = Heartbeat(store, rank, size, address)
    heartbeat.start()
    ranks = Ranks(rank, size, heartbeat)
    try:
        heartbeat.wait_for_all(JOIN_SECONDS)
        _connect_all(ranks, store, device)
    except RankError as error:
        heartbeat.report_failure(str(error))
        raise
    return ranks


def _connect_all(ranks: Ranks, store: Store, device: str) -> None:
    """Connect the ranks to each other, so that they can exchange tensors."""
    import torch
    from torch import distributed

    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda:
        torch.cuda.set_device(local_rank(ranks.rank) % max(torch.cuda.device_count(), 1))
    with ranks.collective("connection of the ranks to each other"):
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=distributed.PrefixStore("prunekit", store),  # pyright: ignore
            rank=ranks.rank,
            world_size=ranks.size,
            timeout=COLLECTIVE_TIMEOUT,
        )


def _rank_and_size() -> tuple[int, int]:
    """Return rank and number of ranks from the environment."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set. "
            "Start the ranks with torchrun, or set all of them; unset WORLD_SIZE for one process."
        )
    try:
        rank, size, _ = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and MASTER_PORT must be numbers: {error}.") from error
    if not 0 <= rank < size:
        raise ConfigError(f"RANK is {rank}; of WORLD_SIZE={size} ranks it must be 0 to {size - 1}.")
    return rank, size


def _connect(rank: int) -> Store:
    """Return the rendezvous store, of torchrun or else of rank 0."""
    from torch import distributed

    provided = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listener = os.environ.get(LISTENER)
    store = distributed.TCPStore(  # pyright: ignore
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not provided,
        timeout=timedelta(seconds=JOIN_SECONDS),
        # Waiting in the store would not tell who is missing.
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=int(listener) if listener else None,
    )
    store.set_timeout(COLLECTIVE_TIMEOUT)
    # torchrun keeps its store when it starts failed ranks again.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(f"attempt {attempt}", store)  # pyright: ignore
