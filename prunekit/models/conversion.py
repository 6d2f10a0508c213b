"""Names of a model's parameters in checkpoints that transformers converts on loading.

Its conversion tables rename tensors, split one into several, join several into one, and stack the
matrices of experts. Here each parameter gets the name of a tensor, of a part of one, or of several,
so that it is read and written in place.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel, core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    PermuteForRope,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from prunekit.architectures.expert_layout import expert_layout
from prunekit.checkpoint.parts import TensorPart, joined_name
from prunekit.checkpoint.reader import Checkpoint
from prunekit.errors import CheckpointError
from prunekit.models.experts import Expert

ROW_SPLITS = (Chunk, *(getattr(core_model_loading, name, Chunk) for name in ["Split"]))
"""Operations that split a tensor into parameters; transformers before 5.20 has but one."""
ALTERNATE = tuple(filter(None, [getattr(core_model_loading, "Interleave", None)]))
"""The operation that joins tensors row by row in turn; transformers before 5.15 has none."""


def converted_names(model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yield each stored name with the model's name for it.

    The matrix of an expert, which transformers would load into a fused tensor, maps to the linear
    of :class:`Expert`.

    Raises:
        CheckpointError: Experts are stored in a layout of which no part is known.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    matrices, fused = _expert_matrices(model), _fused_experts(model)
    prefix, names = model.base_model_prefix, model.state_dict() | fused
    joined: dict[str, dict[int, str]] = {}
    for stored in checkpoint.entries:
        name, source = rename_source_key(stored, renamings, converters, prefix, names)
        converter = next((each for each in converters if source in each.source_patterns), None)
        operations: list[Any] = converter.operations if converter and source else []
        if name in fused and (source is None or "*" not in source):
            yield from _parts_of_experts(name, fused[name], stored, checkpoint, operations)
        elif converter is None or source is None or not operations:
            yield stored, name
        elif name in matrices:
            # Stored as …experts.7.w1.weight.
            part = matrices[name][converter.source_patterns.index(source)]
            yield stored, f"{name.rpartition('.')[0]}.{stored.split('.')[-3]}.{part}.weight"
        elif _splits_rows(operations, checkpoint, stored):
            yield from _split(name, stored, converter, names)
        elif isinstance(operations[0], Concatenate) and operations[0].dim == 0:
            joined.setdefault(name, {})[converter.source_patterns.index(source)] = stored
        else:
            yield stored, name
    for name, sources in joined.items():
        yield joined_name(sources[index] for index in sorted(sources)), name


def _expert_matrices(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Return the linears of an expert, by fused tensor."""
    return {
        f"{name.rpartition('.')[0]}.{fused}": linears
        for name, module in model.named_modules()
        if isinstance(module, Expert)
        for fused, linears in module.layout.parts.items()
    }


def _fused_experts(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return modules whose experts are linears now, by fused tensor."""
    return {
        f"{path}.{tensor}": module
        for path, module in model.named_modules()
        if (layout := expert_layout(module)) and "0" in module._modules
        for tensor in layout.tensors
    }


def _splits_rows(operations: list[Any], checkpoint: Checkpoint, stored: str) -> bool:
    """Return whether each of several parameters is rows of the tensor.

    Raises:
        CheckpointError: They are also put in another order, in a model of text.
    """
    first, *others = operations
    if isinstance(first, ALTERNATE):
        first, *others = [*others, first]
    # Towers are not pruned: their rows are copied as they are.
    moved = [
        each
        for each in others
        if isinstance(each, PermuteForRope) and each.subconfig_key != "vision_config"
    ]
    if moved:
        raise CheckpointError(
            f"{checkpoint.entries[stored].file}: {stored} has its rows in another order than "
            "transformers has. Save the model again with save_pretrained(..., "
            "save_original_format=False)."
        )
    return isinstance(first, ROW_SPLITS) and first.dim == 0


def _split(
    name: str, stored: str, converter: WeightConverter, names: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield the parts of a tensor that hold parameters of their own.

    Args:
        name: Name that transformers has for the first of them.
        stored: Name of the tensor.
        converter: It splits the tensor along the outputs.
        names: Values of the model by name.
    """
    first, *_ = targets = converter.target_patterns
    begin, owned = 0, [name.replace(first, target) for target in targets]
    alternating = isinstance(converter.operations[0], ALTERNATE)
    for index, own in enumerate(owned if names.keys() >= {*owned} else ()):
        count = names[own].shape[0]
        rows = range(begin, begin + count)
        if alternating:
            rows = range(index, count * len(owned), len(owned))
        yield TensorPart(stored, 0, rows, count=1).name, own
        begin += count


def _parts_of_experts(
    name: str, module: nn.Module, stored: str, checkpoint: Checkpoint, operations: list[Any]
) -> Iterator[tuple[str, str]]:
    """Yield each part of a tensor of experts, with its name.

    Args:
        name: Name that the model has for the tensor.
        module: The module of the experts, which are linears now.
        stored: Name of the tensor in the checkpoint.
        checkpoint: The checkpoint.
        operations: Operations by which transformers converts the tensor.

    Raises:
        CheckpointError: It does more than to transpose matrices and to interleave rows.
    """
    layout, entry = expert_layout(module), checkpoint.entries[stored]
    assert layout is not None
    tensor = next(each for each in layout.tensors if name.endswith(f".{each}"))
    owner = name.removesuffix(f".{tensor}")
    is_bias = tensor.endswith("_bias")
    linears = layout.parts[tensor.removesuffix("_bias")]
    first: Any = module.get_submodule(f"0.{linears[0]}")
    count = sum(isinstance(each, Expert) for each in module.children())
    rows, inputs = len(linears) * first.out_features, first.in_features
    transposed = layout.is_transposed(tensor)
    expected = (inputs, rows) if transposed else (rows, inputs)
    interleaved = layout.interleaved
    for operation in operations:
        if isinstance(operation, ALTERNATE) and operation.dim == 1 and not transposed:
            interleaved = not interleaved
            continue
        if not isinstance(operation, Transpose):
            raise CheckpointError(
                f"{entry.file}: {stored} holds all experts in a layout that transformers converts "
                f"by {type(operation).__name__}, of which no part is known. Save the model again "
                "with save_pretrained(..., save_original_format=False)."
            )
        # Some transpose only tensors of another shape than the parameter's.
        transposed ^= not operation.check_dims or entry.shape[1:] != expected
    step = len(linears) if interleaved else 1
    for number in range(count):
        for index, linear in enumerate(linears):
            start = index if interleaved else index * first.out_features
            stop = rows if interleaved else start + first.out_features
            rows_of_part, turned = range(start, stop, step), transposed and not is_bias
            part = TensorPart(stored, number, rows_of_part, turned, count * layout.stacked)
            yield part.name, f"{owner}.{number}.{linear}.{'bias' if is_bias else 'weight'}"
