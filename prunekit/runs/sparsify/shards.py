"""Shards of the pruned checkpoint: the rest first, then each block."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.checkpoint import adapter as adapters
from prunekit.checkpoint.compressed import compress_weight, expand_weight, layer_name
from prunekit.checkpoint.formats import WeightLayout, format_named
from prunekit.checkpoint.output import OutputFolder
from prunekit.checkpoint.packed import expand_tensors, quantized_tensors, storage_config
from prunekit.checkpoint.parts import find_part, is_whole, put_parts
from prunekit.models.auto_class import auto_class
from prunekit.models.layout import Block
from prunekit.models.orientation import stored_transposed, weight_matrix
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.models.sequential.weights import Weights
from prunekit.models.weight_names import stored_names
from prunekit.runs.block_shards import BlockShards
from prunekit.runs.sparsify.plan import Plan
from prunekit.sparsify.layer_result import LayerResult
from prunekit.sparsify.permute_channels import Orders, permute_channels

LayerRecord = dict[str, Any]
"""A pruned linear in journal and report: a ``LayerResult`` as record and where it is stored."""


class ShardWriter(BlockShards):
    """Writes pruned blocks as shards, and restores them on resume.

    Args:
        plan: The plan of the run.
        weights: Source of the model's weights.
        output: The output folder and its journal.
    """

    def __init__(self, plan: Plan, weights: Weights, output: OutputFolder) -> None:
        super().__init__(plan, [block.name for block in plan.blocks], weights, output)
        self._plan = plan
        self._format = format_named(plan.config.output.format)
        self._scheme = plan.recipe.quantize and plan.recipe.quantize.scheme
        self._low_rank = plan.recipe.recover == "lowrank"

    @property
    def adapter_files(self) -> list[str]:
        """Names of the files of an adapter; none without one."""
        return adapters.file_names(block.name for block in self._plan.blocks if self._low_rank)

    def record(self, result: LayerResult, number: int) -> LayerRecord:
        """Return the record of a linear before it is stored.

        Args:
            result: The result of pruning it.
            number: Number of its block in the model.
        """
        name = result.linear.name
        return {
            **result.as_record(),
            "block": number,
            "tensor": self._weights.stored[f"{name}.weight"],
            "transposed": stored_transposed(self._plan.model.get_submodule(name)),
        }

    def write_block(
        self,
        number: int,
        loaded: LoadedBlock,
        results: Sequence[LayerResult],
        orders: Orders | None = None,
        *,
        writes: bool,
    ) -> dict[str, Any]:
        """Compress the pruned weights of a block and write its shard.

        Args:
            number: Number of the block in the model.
            loaded: The pruned block.
            results: Results of its linears.
            orders: Orders into which its channels were permuted.
            writes: This rank writes the files. The others continue: if writing fails, they learn
                of it where they next wait for this rank.

        Returns:
            Values for the journal: file, records of the layers and, if written, digests of files.
        """
        block, layers, packed = self._plan.blocks[number], [], {}
        for result in results:
            layer = self.record(result, number)
            packed |= self._pack(result, layer)
            layers.append(layer)
        values = {"file": self.file(number).name, "layers": layers}
        if writes:
            files = self._write_adapters(block, results)
            pruned = {layer["tensor"] for layer in layers}  # parts of tensors are none of them
            others = self._read([name for name in self._names(block.name) if name not in pruned])
            others = put_parts(others, self._permuted(loaded, block, orders or {}, others))
            shard = self._output.write_shard(number + 2, put_parts(others, packed))
            values["files"] = shard | self._digests(*files)
        return values

    def _pack(self, result: LayerResult, layer: LayerRecord) -> dict[str, Tensor]:
        """Return the tensors of a linear; its record gets their layout."""
        name = layer["tensor"]
        if self._scheme and result.scale is not None:
            return quantized_tensors(name, result.weight, result.scale, self._scheme)
        tensors, layout = compress_weight(
            self._format, name, result.weight, transposed=layer["transposed"]
        )
        if layout:
            layer["stored"] = layout.dump()
        return tensors

    def _expand(self, record: LayerRecord, written: Mapping[str, Tensor]) -> Tensor:
        """Return the weight of a linear from the tensors of its shard."""
        stored, name = record.get("stored"), record["tensor"]
        if self._scheme:
            return expand_tensors(name, written, self._scheme)
        layout = None if stored is None else WeightLayout.load(stored, name)
        if is_whole(name):
            return expand_weight(self._format, name, written, layout)
        weight = find_part(written, name)
        assert weight is not None  # the shard is whole, as its digest says
        return weight

    @torch.no_grad()
    def restore_block(
        self, loaded: LoadedBlock, number: int, layers: Sequence[LayerRecord]
    ) -> None:
        """Load the weights of a block that an earlier run wrote.

        Args:
            loaded: The block with its dense weights.
            number: Number of the block in the model.
            layers: Records of its linears.
        """
        loaded.fork_dense()
        block = self._plan.blocks[number]
        written = self._output.read_shard(number + 2)
        records = {layer["name"]: layer for layer in layers}
        for linear in block.pruned:
            weight = self._expand(records[linear.name], written)
            self._weights.assign(loaded.module.get_submodule(linear.path), "weight", weight)
        if self._low_rank:
            file = self._adapter_file(block)
            for name, adapter in adapters.read_block(file, block.name).items():
                weight = weight_matrix(self._plan.model.get_submodule(name))
                weight.add_(adapter.product.to(weight.device))

    def finish(self, layers: Sequence[LayerRecord], dtype: str | None) -> None:
        """Write the files that make the shards a checkpoint.

        Args:
            layers: Records of all pruned linears.
            dtype: Dtype of the weights; None for that of the dense checkpoint.
        """
        plan = self._plan
        if self._low_rank:
            self._merge_adapters()
        self._output.finish(
            plan.checkpoint,
            dtype,
            self._format,
            compressed_layouts(layers),
            check=lambda written: stored_names(plan.model, written),
            storage=self._quantized_storage(layers),
        )

    def _quantized_storage(self, layers: Sequence[LayerRecord]) -> dict[str, Any] | None:
        """Return the ``quantization_config`` of quantized weights, if there are any."""
        quantization = self._plan.recipe.quantize
        if quantization is None:
            return None
        done = {layer["name"] for layer in layers}
        linears = (
            name
            for name, module in self._plan.model.named_modules()
            if isinstance(module, nn.Linear) and name not in done
        )
        return storage_config(quantization.scheme, quantization.group, linears)

    def _permuted(
        self, loaded: LoadedBlock, block: Block, orders: Orders, others: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return permuted tensors that were not pruned, in stored dtype."""
        if not orders:
            return {}
        stored = self._weights.stored
        paths = [path for path, _ in loaded.module.named_parameters()]
        names = {path: stored.get(f"{block.name}.{path}", "") for path in paths}
        copies = {
            path: value.clone()
            for path, name in names.items()
            if (value := find_part(others, name)) is not None
        }
        return {names[path]: copies[path] for path in permute_channels(loaded, orders, copies)}

    def _write_adapters(self, block: Block, results: Sequence[LayerResult]) -> list[Path]:
        """Write the adapters of a block, if any; return their files."""
        if not self._low_rank:
            return []
        found = {each.linear.name: each.adapter for each in results if each.adapter}
        return [adapters.write_block(self._output.folder, block.name, found)]

    def _adapter_file(self, block: Block) -> Path:
        """Return the file of a block's adapters that the journal names."""
        names = self._output.journal["block", block.name]["files"]
        return next(
            self._output.folder / name for name in names if name.startswith(adapters.FOLDER)
        )

    def _merge_adapters(self) -> None:
        """Merge the adapters of all blocks into one file.

        The journal then names it, and the files of the blocks are removed. A block whose adapters
        are lost is pruned again, so its entry names the file that holds them.
        """
        folder, blocks = self._output.folder, self._plan.blocks
        sources = {block.name: self._adapter_file(block) for block in blocks}
        whole = folder / adapters.FOLDER / adapters.FILE
        if set(sources.values()) != {whole}:
            merged = self._digests(adapters.merge(folder, sources))
            for name, file in sources.items():
                values = self._output.journal["block", name]
                part = file.relative_to(folder).as_posix()
                kept = {key: digest for key, digest in values["files"].items() if key != part}
                values = values | {"files": kept | merged}
                self._output.append_journal("block", name, values)
        linears = [self._plan.model.get_submodule(linear.name) for linear in self._plan.linears]
        transposed = any(map(stored_transposed, linears))
        model = self._plan.model
        opened = auto_class(model.config.model_type, type(model).__name__)
        adapters.write_config(folder, transposed=transposed, task=opened.peft)
        for name in adapters.file_names(sources):
            if Path(name).name not in {adapters.FILE, adapters.CONFIG}:
                (folder / name).unlink(missing_ok=True)


def compressed_layouts(layers: Sequence[LayerRecord]) -> dict[str, WeightLayout]:
    """Return layouts of linears stored compressed, by name in the files."""
    return {
        layer_name(layer["tensor"]): WeightLayout.load(layer["stored"], layer["tensor"])
        for layer in layers
        if "stored" in layer
    }
