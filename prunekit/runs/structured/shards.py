"""Shards of a smaller model, cut from the files block by block."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.checkpoint.output import OutputFolder
from prunekit.checkpoint.parts import find_part, put_parts, whole_tensors
from prunekit.checkpoint.reader import Checkpoint
from prunekit.models.experts import unfused
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.models.sequential.weights import Weights
from prunekit.models.units.removal import described_model
from prunekit.models.units.replay import unless_equal
from prunekit.models.weight_names import stored_names
from prunekit.runs.block_shards import BlockShards
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.structured.smaller_model import SmallerModel


class UnitShards(BlockShards):
    """Writes a smaller model as shards, and restores blocks on resume.

    Tensors are cut from their stored values, unless the caller passes changed ones.

    Args:
        plan: The plan of the run.
        smaller: The model without all removed units.
        output: The output folder and its journal.
    """

    def __init__(self, plan: StructuredPlan, smaller: SmallerModel, output: OutputFolder) -> None:
        weights = Weights(smaller.model, smaller.checkpoint, plan.dtype, plan.device)
        blocks = [name for runner in smaller.stacks for name in runner.names]
        super().__init__(plan, blocks, weights, output)
        self._plan, self._smaller = plan, smaller

    def announce(self) -> None:
        """Announce the shards: the rest, and one a block."""
        self._output.announce_shards(len(self.blocks) + 1)

    def begin(self) -> None:
        """Announce the shards, and write the first."""
        self.announce()
        self.write_rest()

    def write_block(
        self,
        number: int,
        loaded: LoadedBlock | None = None,
        changed: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """Write the shard of a block.

        A loaded block is then set to the written values, rounded where the files are narrower: a
        resumed run continues from the same ones.

        Args:
            number: Number of the block in the smaller model.
            loaded: The block with all heads and neurons, if it is loaded.
            changed: Its tensors that are not as stored, by name in the model, with all heads and
                neurons: weights that read removed ones, and all that a compensation changed.

        Returns:
            Values for the journal: names of the changed tensors and, on the rank that writes, file
            and digest.
        """
        names, written = [*(changed or {})], self._written(changed or {})
        values: dict[str, Any] = {"changed": names}
        if self._output.ranks.is_main:
            tensors = put_parts(self._read(self._names(self.blocks[number])), written)
            files = self._output.write_shard(number + 2, tensors)
            values |= {"file": self.file(number).name, "files": files}
        if loaded is not None:
            self._put_back(loaded, names, written)
        return values

    def restore_block(self, loaded: LoadedBlock, number: int) -> None:
        """Give a loaded block the values that an earlier run wrote.

        Args:
            loaded: The block with all heads and neurons, and its stored values.
            number: Number of the block in the smaller model.
        """
        names = self._output.journal["block", self.blocks[number]]["changed"]
        shard, stored = self._output.read_shard(number + 2), self._weights.stored
        kept = (stored[name] for name in names if name in stored)
        found = ((name, find_part(shard, name)) for name in kept)
        self._put_back(loaded, names, {name: value for name, value in found if value is not None})

    def write_model(self, model: PreTrainedModel) -> dict[str, str]:
        """Write all shards of the smaller model from memory.

        Args:
            model: The smaller model, in float32.

        Returns:
            The digests of the files, by name.
        """
        with unfused(model):
            values = model.state_dict(keep_vars=True)
        parts = {stored: values[name].detach() for name, stored in self._weights.stored.items()}
        inside = [self._names(block) for block in self.blocks]
        rest = self._weights.checkpoint.entries.keys() - set().union(*inside)
        digests: dict[str, str] = {}
        owners = {name: whole_tensors([name])[0] for name in parts}
        for number, names in enumerate([sorted(rest), *inside], start=1):
            own = {name: parts[name] for name in parts if owners[name] in {*names}}
            tensors = put_parts(self._read(names), self._rounded(own, torch.float32))
            digests |= self._output.write_shard(number, tensors)
        return digests

    def finish(self, dtype: str | None) -> None:
        """Write the files that make the shards a checkpoint.

        Args:
            dtype: Dtype of the weights; None for that of the whole model.
        """

        def check(written: Checkpoint) -> None:
            stored_names(described_model(self._plan.model, written.config), written)

        self._output.finish(self._smaller.checkpoint, dtype, check=check)

    @torch.no_grad()
    def _put_back(
        self, loaded: LoadedBlock, names: Iterable[str], written: Mapping[str, Tensor]
    ) -> None:
        """Give changed tensors of a loaded block their written values.

        Args:
            loaded: The block with all heads and neurons; those that are removed become 0 where they
                are read.
            names: Names of the changed tensors in the model.
            written: Their kept parts by name in the files.
        """
        for name in names:
            path, _, attribute = name.removeprefix(f"{loaded.name}.").rpartition(".")
            module = loaded.module.get_submodule(path)
            before: Tensor = getattr(module, attribute)
            part = written.get(self._weights.stored.get(name, ""))
            after = torch.zeros_like(before)
            if part is not None:
                after = self._smaller.put_back(name, part).to(before)
            if not torch.equal(before, after):
                loaded.end_stages()  # outputs that are cached are those of other weights
                self._weights.assign(module, attribute, after)

    def _written(self, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the kept parts of changed tensors, by name in the files.

        They are as they are written: the stored values where a part is only rounded.
        """
        parts = {name: self._smaller.cut(name, value.detach()) for name, value in changed.items()}
        own = {self._weights.stored[name]: part for name, part in parts.items() if part is not None}
        return self._rounded(own, self._plan.dtype)

    def _rounded(self, parts: Mapping[str, Tensor], computed: torch.dtype) -> dict[str, Tensor]:
        """Return parts as written: as stored where they did not change.

        ``computed``: type to which they were rounded when they were loaded.
        """
        stored = self._weights.checkpoint.read([*parts])
        return {
            name: self._as_written(name, unless_equal(stored[name], part.cpu(), computed))
            for name, part in parts.items()
        }
