"""Map parameter names of a model to tensor names of a checkpoint."""

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from prunekit.architectures.empty_linear import EmptyLinear
from prunekit.architectures.expert_layout import expert_layout
from prunekit.checkpoint.header import FLOAT_DTYPES, TensorEntry
from prunekit.checkpoint.parts import TensorPart, whole_tensors
from prunekit.checkpoint.reader import Checkpoint
from prunekit.errors import CheckpointError
from prunekit.models.experts import Expert


def stored_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the checkpoint name of each parameter and stored buffer.

    A checkpoint may have been saved from the bare base model or with a head that this model does
    not have, may omit tied weights, and may use names that transformers has since changed.

    Raises:
        CheckpointError: A parameter is missing from the files, or has another shape or a data
            type there that cannot be computed with; or the files have weights of a layer that has
            no units.
    """
    values = model.state_dict(keep_vars=True)
    renamed = [(stored, name) for stored, name in _renamed(model, checkpoint) if name in values]
    found = {name: stored for stored, name in renamed}
    counts = Counter(name for _, name in renamed)
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        for name, other in ((target, source), (source, target)):
            if name not in found and other in found:
                found[name] = found[other]
    missing = [
        name
        for name, value in values.items()
        if isinstance(value, nn.Parameter) and name not in found
    ]
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}: has no {missing[0]}"
            + (f" and lacks {len(missing) - 1} more tensors" if len(missing) > 1 else "")
            + f" that {type(model).__name__} needs. It is incomplete or of another architecture."
        )
    _check_without_units(model, checkpoint)
    for name, stored in found.items():
        if (
            counts[name] > 1
            and stored in checkpoint.entries
            and (checkpoint.entries[stored].shape != tuple(values[name].shape))
        ):
            raise CheckpointError(
                f"{checkpoint.folder}: transformers merges {counts[name]} of its tensors into "
                f"{name}, and nothing says how {type(model).__name__} uses their parts. Open it "
                "with from_pretrained of transformers."
            )
        _check_layout(name, values[name], stored, checkpoint)
    return found


def check_whole_tensors(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose experts are parts of tensors.

    Raises:
        CheckpointError: A parameter is stored as a part of a tensor.
    """
    for stored in stored_names(model, checkpoint).values():
        if part := TensorPart.parse(stored):
            raise CheckpointError(
                f"{checkpoint.entries[part.tensor].file}: {part.tensor} holds all experts in one "
                "tensor. Such weights can be pruned, not yet trained or changed otherwise; drop "
                "the table that does so."
            )


def unused_tensors(
    checkpoint: Checkpoint, stored: Mapping[str, str], widths: Set[int]
) -> Iterator[tuple[str, TensorEntry]]:
    """Yield unused tensors of the checkpoint that have a dimension in ``widths``.

    Args:
        checkpoint: The checkpoint.
        stored: Result of :func:`stored_names`.
        widths: Sizes to look for.

    Yields:
        Name and entry, in alphabetical order.
    """
    for name in sorted(checkpoint.entries.keys() - {*whole_tensors(stored.values())}):
        if widths & {*checkpoint.entries[name].shape}:
            yield name, checkpoint.entries[name]


def _renamed(model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yield each stored name with the model's name for it.

    The matrix of an expert, which transformers would load into a fused tensor, maps to the linear
    of :class:`Expert`.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    experts = {
        f"{name.rpartition('.')[0]}.{fused}": linears
        for name, module in model.named_modules()
        if isinstance(module, Expert)
        for fused, linears in module.layout.parts.items()
    }
    fused = {
        f"{path}.{tensor}": module
        for path, module in model.named_modules()
        if (layout := expert_layout(module)) and "0" in module._modules
        for tensor in layout.tensors
    }
    prefix = model.base_model_prefix
    names = model.state_dict() | fused
    for stored in checkpoint.entries:
        name, source = rename_source_key(stored, renamings, converters, prefix, names)
        owner = name.rpartition(".")[0]
        if name in fused and (source is None or "*" not in source):
            operations = [
                each
                for part in converters
                if source in part.source_patterns
                for each in part.operations
            ]
            yield from _parts_of_experts(name, fused[name], stored, checkpoint, operations)
            continue
        if source is not None and name in experts:
            sources = next(
                part.source_patterns for part in converters if source in part.source_patterns
            )
            # Stored as …experts.7.w1.weight.
            number, part = stored.split(".")[-3], experts[name][sources.index(source)]
            name = f"{owner}.{number}.{part}.weight"
        yield stored, name


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
        CheckpointError: It does more than to transpose matrices.
    """
    owner, _, tensor = name.rpartition(".")
    layout, entry = expert_layout(module), checkpoint.entries[stored]
    assert layout is not None
    is_bias = tensor.endswith("_bias")
    linears = layout.parts[tensor.removesuffix("_bias")]
    first: Any = module.get_submodule(f"0.{linears[0]}")
    rows, inputs = len(linears) * first.out_features, first.in_features
    expected = (inputs, rows) if layout.transposed else (rows, inputs)
    transposed = layout.transposed
    for operation in operations:
        if not isinstance(operation, Transpose):
            raise CheckpointError(
                f"{entry.file}: {stored} holds all experts in a layout that transformers converts "
                f"by {type(operation).__name__}, of which no part is known. Save the model again "
                "with save_pretrained(..., save_original_format=False)."
            )
        # Some transpose only tensors of another shape than the parameter's.
        transposed ^= not operation.check_dims or entry.shape[1:] != expected
    step = len(linears) if layout.interleaved else 1
    for number in range(entry.shape[0]):
        for index, linear in enumerate(linears):
            start = index if layout.interleaved else index * first.out_features
            stop = rows if layout.interleaved else start + first.out_features
            part = TensorPart(stored, number, range(start, stop, step), transposed and not is_bias)
            yield part.name, f"{owner}.{number}.{linear}.{'bias' if is_bias else 'weight'}"


def _check_without_units(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Refuse weights of layers that have no units according to the config."""
    for name, module in model.named_modules():
        stored = f"{name}.weight"
        if isinstance(module, EmptyLinear) and stored in checkpoint.entries:
            raise CheckpointError(
                f"{checkpoint.entries[stored].file}: {stored} is of a layer of which config.json "
                "keeps no units. The config belongs to another model."
            )


def _check_layout(name: str, value: Tensor, stored: str, checkpoint: Checkpoint) -> None:
    entry = checkpoint.entry(stored)
    if entry is None:
        raise CheckpointError(
            f"{checkpoint.folder}: {stored}, which is {name}, is no part of that tensor. The "
            "config belongs to another model."
        )
    if isinstance(value, nn.Parameter) and entry.dtype not in FLOAT_DTYPES:
        dtype = entry.unreadable or str(entry.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{entry.file}: {stored} is stored as {dtype}. A model can be run and pruned in "
            "float64, float32, float16 and bfloat16; start from a checkpoint in one of these."
        )
    if entry.shape != tuple(value.shape):
        raise CheckpointError(
            f"{entry.file}: {stored} has shape {list(entry.shape)}, but config.json makes "
            f"{name} {list(value.shape)}. The config belongs to another model."
        )
