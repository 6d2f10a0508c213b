"""Map parameter names of a model to tensor names of a checkpoint."""

from collections import Counter
from collections.abc import Iterator, Mapping, Set

from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.architectures.empty_linear import EmptyLinear
from prunekit.checkpoint.header import FLOAT_DTYPES, TensorEntry
from prunekit.checkpoint.parts import is_whole, whole_tensors
from prunekit.checkpoint.reader import Checkpoint
from prunekit.errors import CheckpointError
from prunekit.models.conversion import converted_names


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
    renamed = [
        (stored, name) for stored, name in converted_names(model, checkpoint) if name in values
    ]
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
    """Refuse a checkpoint whose tensors are not those of parameters.

    Raises:
        CheckpointError: A parameter is stored as a part of a tensor, or in several.
    """
    for name, stored in stored_names(model, checkpoint).items():
        if not is_whole(stored):
            tensor, *_ = whole_tensors([stored])
            raise CheckpointError(
                f"{checkpoint.entries[tensor].file}: {tensor} is not all of {name} and of nothing "
                "else. Such weights can be pruned, not yet trained or changed otherwise; drop the "
                "table that does so."
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
