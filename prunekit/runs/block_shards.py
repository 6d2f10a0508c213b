"""Shards of a run: first the rest, then each block."""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from prunekit.checkpoint.atomic import file_sha256
from prunekit.checkpoint.header import FLOAT_DTYPES
from prunekit.checkpoint.output import OutputFolder
from prunekit.checkpoint.parts import whole_tensors
from prunekit.models.sequential.weights import Weights
from prunekit.runs.plan_base import PlanBase


class BlockShards:
    """Base of the writers of shards: data types, names and the rest.

    Args:
        plan: The plan of the run.
        blocks: Names of the blocks in run order.
        weights: Source of the weights.
        output: The output folder and its journal.
    """

    def __init__(
        self, plan: PlanBase, blocks: Sequence[str], weights: Weights, output: OutputFolder
    ) -> None:
        self.blocks, self._weights, self._output = blocks, weights, output
        asked = plan.config.model.dtype
        self._dtype = None if asked == "auto" else getattr(torch, asked)

    def write_rest(self) -> None:
        """Write the first shard: unchanged tensors outside of the blocks."""
        if ("rest", "") in self._output.journal or not self._output.ranks.is_main:
            return
        inside = {name for block in self.blocks for name in self._names(block)}
        names = [name for name in self._weights.checkpoint.entries if name not in inside]
        files = self._output.write_shard(1, self._read(names))
        self._output.append_journal("rest", "", {"files": files})

    def file(self, number: int) -> Path:
        """Return the path of the shard of a block, by its number."""
        return self._output.shard_path(number + 2)

    def _names(self, block: str) -> list[str]:
        """Return the names of a block's tensors in the checkpoint."""
        stored = self._weights.stored
        return whole_tensors(stored[name] for name in stored if name.startswith(f"{block}."))

    def _read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Read tensors as they are written; refuse NaN and inf."""
        tensors = self._weights.checkpoint.read(names)
        self._weights.check_finite(tensors)
        return {name: self._as_written(name, value) for name, value in tensors.items()}

    def _as_written(self, name: str, value: Tensor) -> Tensor:
        """Return the value of a tensor, or part of one, as written."""
        entry = self._weights.checkpoint.entry(name)
        assert entry is not None
        return as_stored(value, self._dtype or entry.dtype)

    def _digests(self, *files: Path) -> dict[str, str]:
        """Return the SHA-256 of files, by name in the output folder."""
        return {
            file.relative_to(self._output.folder).as_posix(): file_sha256(file) for file in files
        }


def as_stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor as it is written; ``dtype`` is for floating-point ones."""
    return value.to(dtype).contiguous() if value.dtype in FLOAT_DTYPES else value.contiguous()
