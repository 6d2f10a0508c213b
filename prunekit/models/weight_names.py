"""Map parameter names of a model to tensor names of a checkpoint."""

from collections import Counter
from collections.abc import Iterator, Mapping, Set

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from prunekit.checkpoint.header import FLOAT_DTYPES, TensorEntry
from prunekit.checkpoint.reader import Checkpoint
from prunekit.errors import CheckpointError
from prunekit.models.experts import Expert


def stored_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the checkpoint name of each parameter and stored buffer.

    A checkpoint may have been saved from the bare base model or with a head that this model does
    not have, may omit tied weights, and may use names that transformers has since changed.

    Raises:
        CheckpointError: A parameter is missing from the files, or has another shape or a data
            type there that cannot be computed with.
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
    for name, stored in found.items():
        if counts[name] > 1 and checkpoint.entries[stored].shape != tuple(values[name].shape):
            raise CheckpointError(
                f"{checkpoint.folder}: transformers merges {counts[name]} of its tensors into "
                f"{name}, and nothing says how {type(model).__name__} uses their parts. Open it "
                "with from_pretrained of transformers."
            )
        _check_layout(name, values[name], stored, checkpoint)
    return found


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
    for name in sorted(checkpoint.entries.keys() - {*stored.values()}):
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
    prefix = model.base_model_prefix
    names = model.state_dict() | experts
    for stored in checkpoint.entries:
        name, source = rename_source_key(stored, renamings, converters, prefix, names)
        owner = name.rpartition(".")[0]
        if source is None and name in experts:
            raise CheckpointError(
                f"{checkpoint.entries[stored].file}: {stored} holds all experts in one tensor; "
                "only files with one matrix per expert can be read, as save_pretrained writes."
            )
        if source is not None and name in experts:
            sources = next(
                part.source_patterns for part in converters if source in part.source_patterns
            )
            # Stored as …experts.7.w1.weight.
            number, part = stored.split(".")[-3], experts[name][sources.index(source)]
            name = f"{owner}.{number}.{part}.weight"
        yield stored, name


def _check_layout(name: str, value: Tensor, stored: str, checkpoint: Checkpoint) -> None:
    entry = checkpoint.entries[stored]
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
