"""Weights of a trained model as they are written, block by block."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.checkpoint.compressed import compress_weight
from prunekit.checkpoint.formats import format_named
from prunekit.checkpoint.header import FLOAT_DTYPES
from prunekit.checkpoint.output import OutputFolder
from prunekit.errors import NumericsError
from prunekit.models.experts import unfused
from prunekit.models.orientation import outputs_first, stored_transposed
from prunekit.models.weight_names import stored_names
from prunekit.runs.sparsify.shards import LayerRecord
from prunekit.runs.structured.written import as_stored, unchanged
from prunekit.runs.trained.plan import TrainedPlan


class ModelWriter:
    """Writes a trained model as shards, the blocks last.

    Args:
        plan: The plan of the run.
        model: The trained model.
        output: The output folder.
    """

    def __init__(self, plan: TrainedPlan, model: PreTrainedModel, output: OutputFolder) -> None:
        self._plan, self._model, self._output = plan, model, output
        self._format = format_named(plan.config.output.format)
        self._stored = stored_names(plan.model, plan.checkpoint)

    @torch.no_grad()
    def write(self, measured: Mapping[str, LayerRecord], *, writes: bool) -> dict[str, Any]:
        """Write all shards; return the values of the journal entry.

        Args:
            measured: Record of each pruned linear by name; facts of its storage are added.
            writes: This rank writes the files.

        Raises:
            NumericsError: A value is beyond the range of the type in which it would be written.
        """
        layers, files = [], {}
        with unfused(self._model):
            values = self._model.state_dict()
            inside: set[str] = set()
            for number, block in enumerate(self._plan.blocks):
                names = self._names(f"{block.name}.")
                inside |= names.keys()
                tensors = self._tensors(values, names)
                for linear in block.pruned:
                    record = measured[linear.name] | {"block": number}
                    layers.append(self._compress(record, tensors))
                if writes:
                    files |= self._output.write_shard(number + 2, tensors)
            rest = dict.fromkeys(self._plan.checkpoint.entries.keys() - inside)
            rest = {**rest, **{name: own for name, own in self._names("").items() if name in rest}}
            if writes:
                files |= self._output.write_shard(1, self._tensors(values, rest))
        return {"layers": layers, "files": files}

    def _names(self, prefix: str) -> dict[str, str]:
        """Return the model's name of each stored tensor below a prefix."""
        return {stored: name for name, stored in self._stored.items() if name.startswith(prefix)}

    def _tensors(
        self, values: Mapping[str, Tensor], names: Mapping[str, str | None]
    ) -> dict[str, Tensor]:
        """Return tensors as they are written, by stored name.

        Args:
            values: Tensors of the model, by name.
            names: Stored name → name in the model; None for a tensor that no module has.
        """
        checkpoint, asked = self._plan.checkpoint, self._plan.config.model.dtype
        entries = checkpoint.entries
        # Of weights that float32 rounds, those that did not change are copied.
        copied = {name for name in names if names[name] is None or _rounds(entries[name].dtype)}
        dense, tensors = checkpoint.read(copied), {}
        for name, own in names.items():
            value = dense.get(name)
            if own is not None:
                value = unchanged(value, values[own].detach().cpu(), torch.float32)
            assert value is not None
            dtype = entries[name].dtype if asked == "auto" else getattr(torch, asked)
            tensors[name] = as_stored(value, dtype)
            _check_range(name, value, tensors[name])
        return _apart(tensors)

    def _compress(self, record: LayerRecord, tensors: dict[str, Tensor]) -> LayerRecord:
        """Replace a weight by its compressed parts; return its record."""
        name = self._stored[f"{record['name']}.weight"]
        linear = self._plan.model.get_submodule(record["name"])
        weight, transposed = tensors.pop(name), stored_transposed(linear)
        zeros = int((outputs_first(linear, weight) == 0).sum())
        packed, layout = compress_weight(self._format, name, weight, transposed=transposed)
        tensors |= packed
        stored = {"stored": layout.dump()} if layout else {}
        facts = {"sparsity": zeros / weight.numel(), "tensor": name, "transposed": transposed}
        return record | facts | stored


def _rounds(dtype: torch.dtype) -> bool:
    """Return whether values of a type are rounded in float32."""
    return dtype in FLOAT_DTYPES and dtype.itemsize > torch.float32.itemsize


def _check_range(name: str, value: Tensor, stored: Tensor) -> None:
    """Refuse a value that became infinite where it was cast."""
    if value.dtype != stored.dtype and bool((stored.isinf() & value.isfinite()).any()):
        limit = torch.finfo(stored.dtype).max
        raise NumericsError(
            f"{name}: the training made a value beyond {limit:g}, the range of {stored.dtype}, in "
            'which it would be written. Set model.dtype = "bfloat16" or "float32".'
        )


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory, for a file of single tensors."""
    seen: set[int] = set()
    for name, value in tensors.items():
        if value.data_ptr() in seen:
            tensors[name] = value.clone()
        seen.add(tensors[name].data_ptr())
    return tensors


def gradual_records(plan: TrainedPlan, patterns: Mapping[str, str]) -> dict[str, LayerRecord]:
    """Return the records of linears that were pruned while training.

    Args:
        plan: The plan of the run.
        patterns: Pattern of each linear by name, where it is not that of the run.
    """
    linears: Iterable[Any] = (each for block in plan.blocks for each in block.pruned)
    return {
        linear.name: {
            "name": linear.name,
            "shape": [linear.outputs, linear.inputs],
            "sparsity": 0.0,
            "relative_error": None,
            "seconds": None,
            **({"pattern": patterns[linear.name]} if linear.name in patterns else {}),
        }
        for linear in linears
    }
