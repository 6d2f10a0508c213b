"""Identity of a job, which a resumed run must share.

The config, texts, ``config.json`` and headers are compared before anything else. Weights are too
large for that: each tensor is digested when it is first read, and the journal holds the digests
before any result that depends on them.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from prunekit.checkpoint.atomic import file_sha256
from prunekit.checkpoint.header import TensorEntry
from prunekit.checkpoint.reader import Checkpoint
from prunekit.distributed.ranks import Ranks
from prunekit.errors import CheckpointError, ConfigError
from prunekit.evaluation import harness_tasks
from prunekit.runs.plan_base import PlanBase
from prunekit.runs.texts import Data, tasks_of

CHUNK_BYTES = 1 << 22
WEIGHTS = "weights"
"""Key of journal entries that hold digests of tensors read so far, by name."""


def fingerprint(plan: PlanBase, tokens: Data | None, evaluated: Mapping[str, Data]) -> str:
    """Return the SHA-256 of all that decides the result, but the weights.

    Args:
        plan: The plan of the run.
        tokens: Calibration data; None for a run without it.
        evaluated: Evaluation data by source.
    """
    from prunekit._version import __version__

    config, tasks = plan.config.dump(), tasks_of(plan.config.evaluate)
    # These change no bit of the result, but for the rounding.
    quantize = config.pop("output", {}).get("quantize")
    config.pop("gates", None)
    config.get("calibration", {}).pop("hidden", None)
    for table in ("train", "apt"):
        config.get(table, {}).pop("save_every", None)
    return digest(
        {
            "prunekit": __version__,
            "config": config,
            "quantize": quantize,
            "calibration": tokens.digest if tokens else None,
            "evaluation": {source: each.digest for source, each in evaluated.items()},
            "tasks": tasks and harness_tasks.digest(tasks),
            "dtype": str(plan.dtype),  # depends on the CPU
            "model": model_identity(plan.checkpoint),
        }
    )


def model_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return config and layout of a checkpoint; its weights are not read."""
    return {
        "config": file_sha256(checkpoint.folder / "config.json"),
        "tensors": {
            name: [entry.file.name, str(entry.dtype), entry.shape, entry.start]
            for name, entry in sorted(checkpoint.file_entries.items())
        },
    }


def digest(identity: object) -> str:
    """Return the SHA-256 of a value, by its JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def file_digests(files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of the content of files, by their paths."""
    return {str(file): file_sha256(file) for file in sorted(files)}


class WeightDigests:
    """Digests of the tensors of a run, taken when first read."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._new: dict[str, str] = {}
        self._unshared: dict[str, str] = {}
        self._of_ranks: dict[str, tuple[str, int]] = {}
        self._lock = Lock()  # the next block is read in a thread of its own

    def record(self, name: str, tensor: Tensor) -> None:
        """Digest a tensor as stored, unless it was read before."""
        with self._lock:
            if name in self._seen:
                return
            self._seen.add(name)
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        found = hashlib.sha256(content.data).hexdigest()
        with self._lock:
            self._new[name] = self._unshared[name] = found

    def take(self) -> dict[str, dict[str, str]]:
        """Return a journal entry of the tensors read since the last call."""
        with self._lock:
            taken, self._new = self._new, {}
        return {WEIGHTS: taken} if taken else {}

    def require_same(self, ranks: Ranks) -> None:
        """Compare the tensors read since the last call over the ranks.

        Raises:
            CheckpointError: Two ranks have read different values.
        """
        with self._lock:
            unshared, self._unshared = self._unshared, {}
        if not ranks.is_distributed:
            return
        for rank, digests in enumerate(ranks.all_gather_object(unshared)):
            for name, found in digests.items():
                known, first = self._of_ranks.setdefault(name, (found, rank))
                if known != found:
                    raise CheckpointError(
                        f"model.path: {name} has other values on rank {rank} than on rank {first}. "
                        "All ranks need the same checkpoint; start again with --overwrite."
                    )


def check_weights(checkpoint: Checkpoint, entries: Iterable[Mapping[str, Any]]) -> None:
    """Refuse to resume with other weights than the stopped run has read.

    Args:
        checkpoint: The dense checkpoint.
        entries: Values of all journal entries.

    Raises:
        ConfigError: A tensor was changed since.
    """
    expected: dict[str, str] = {}
    for values in entries:
        expected |= values.get(WEIGHTS) or {}
    for name, known in expected.items():
        entry = checkpoint.file_entries[name]
        if _span_sha256(entry) != known:
            raise ConfigError(
                f"{entry.file}: {name} was changed since the run began, so --resume cannot "
                "continue it. Run with --overwrite, or choose another output.path."
            )


def _span_sha256(entry: TensorEntry) -> str:
    found, left = hashlib.sha256(), entry.nbytes
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        while left:
            chunk = file.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise CheckpointError(f"{entry.file}: is shorter than its header says.")
            found.update(chunk)
            left -= len(chunk)
    return found.hexdigest()
