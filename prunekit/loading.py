"""A model without weights, whose modules are given theirs one after another from a checkpoint."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Set
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from prunekit.checkpoint import SINGLE, Checkpoint, Entry, read_config
from prunekit.description import described, understood
from prunekit.errors import CheckpointError
from prunekit.experts import PARTS, Expert, unfuse
from prunekit.fetching import Fetch
from prunekit.lowrank import Adapter
from prunekit.removal import restore


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the model that ``config.json`` describes on the meta device: its shape, no weight.

    Where units were taken out, it has what is left of them; fused experts have linears.

    Buffers that no checkpoint stores (rotary frequencies) are real.

    Raises:
        CheckpointError: transformers does not know the model, or only by code that came with it, or
            nothing can be built from what is said of it.
    """
    config, kind = described(checkpoint)

    def build() -> PreTrainedModel:
        with init_empty_weights(include_buffers=False):
            if kind is None:
                return AutoModel.from_config(config, dtype=torch.float32).eval()
            model = kind._from_config(config, dtype=torch.float32).eval()
            restore(model)
            return model

    model = understood(checkpoint, "cannot build the model from it", build)
    unfuse(model)
    return model


def has_weights(folder: Path) -> bool:
    """Say whether a folder has weights of any kind beside its ``config.json``."""
    return any(path.suffix in {".safetensors", ".bin", ".pt", ".pth"} for path in folder.iterdir())


def outline(folder: Path) -> Checkpoint:
    """Return the checkpoint that a ``config.json`` alone describes: names, shapes and types.

    Raises:
        CheckpointError: As :func:`empty_model`.
    """
    config = read_config(folder)
    model = empty_model(Checkpoint(folder, config, {}, {}))
    said = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if said not in {"float32", "float16", "bfloat16"}:
        raise CheckpointError(f"{folder / 'config.json'}: dtype {said!r} cannot be planned.")
    dtype, tied = getattr(torch, said), getattr(model, "all_tied_weights_keys", {})
    entries = {
        name: Entry(folder / SINGLE, dtype, tuple(value.shape), value.numel() * dtype.itemsize)
        for name, value in model.state_dict().items()
        if name not in tied
    }
    return Checkpoint(folder, config, entries, entries)


def longest(model: PreTrainedModel) -> int:
    """Return the most tokens a model takes at once; without a limit, a number beyond any text."""
    limit = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    words = model.get_input_embeddings()
    for module in model.modules():
        # RoBERTa counts positions from the row after its padding row.
        if not isinstance(module, nn.Embedding) or module is words:
            continue
        if module.num_embeddings == limit and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    return limit


class Weights:
    """Gives modules of an empty model their weights from a checkpoint, and takes them away.

    Attributes:
        adapters: What is added to the weights of linears, by their names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.adapters: Mapping[str, Adapter] = {}
        self._fetch: Fetch | None = None
        self.stored = stored_names(model, checkpoint)
        self._prefixes = {module: name for name, module in model.named_modules()}
        for module in model.modules():
            if _looks_up(module):
                # Not one of ours: a block may be copied with its hooks.
                module.register_forward_hook(partial(_cast, dtype))

    def load(self, module: nn.Module, *, without: Iterable[nn.Module] = ()) -> None:
        """Give a module's parameters and persistent buffers their stored values.

        ``without``: submodules that are left empty.
        """
        left_out = {child for excluded in without for child in excluded.modules()}
        wanted = self._wanted(module, left_out)
        names = set(wanted.values())
        tensors = self._fetched(names)
        tensors |= self.checkpoint.read(names - tensors.keys())
        for child, name, buffer in _buffers(module, left_out):
            child._buffers[name] = buffer.to(self.device)
        for (child, name), stored in wanted.items():
            self.assign(child, name, tensors[stored])
            if name == "weight" and (adapter := self.adapters.get(self._prefixes[child])):
                adapter.add_to(child)

    def fetch(self, module: nn.Module) -> None:
        """Begin to read in the background what :meth:`load` will be asked for next."""
        if self._fetch:
            self._fetch.cancel()
        names = self._wanted(module, set()).values()
        self._fetch = Fetch(self.checkpoint, names, self.device)
        self._fetch.start()

    def _fetched(self, names: set[str]) -> dict[str, Tensor]:
        if self._fetch is None or self._fetch.names != names:
            return {}
        fetch, self._fetch = self._fetch, None
        return fetch.take()

    def _wanted(
        self, module: nn.Module, left_out: set[nn.Module]
    ) -> dict[tuple[nn.Module, str], str]:
        """Return the stored name of each parameter and buffer of a module."""
        return {
            (child, name): self.stored[self._name(child, name)]
            for child in module.modules()
            if child not in left_out
            for name in [*child._parameters, *child._buffers]
            if self._name(child, name) in self.stored
        }

    def assign(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Put ``value`` where ``module.name`` is, in the type and on the device of the run."""
        cast = value.is_floating_point() and not _looks_up(module)
        value = value.to(self.device, self.dtype if cast else None)
        if name in module._parameters:
            value = nn.Parameter(value, requires_grad=False)
            module._parameters[name] = value
        else:
            module._buffers[name] = value

    def drop(self, module: nn.Module) -> None:
        """Take the parameters of a module away again."""
        for child in module.modules():
            for name, value in child._parameters.items():
                if value is not None:
                    child._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)

    def _name(self, module: nn.Module, name: str) -> str:
        prefix = self._prefixes[module]
        return f"{prefix}.{name}" if prefix else name


def _cast(dtype: torch.dtype, _: nn.Module, __: tuple, looked_up: Tensor) -> Tensor:
    return looked_up.to(dtype)


def _looks_up(module: nn.Module) -> bool:
    """Say whether a module only picks rows of its weight.

    It keeps the stored type, and on a CPU the stored place: the rows are cast when they are picked,
    so that a vocabulary is never copied. A subclass may compute with its weight, as Gemma's does.
    """
    return type(module) is nn.Embedding


def stored_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Return, for each parameter and stored buffer of the model, its name in the checkpoint.

    A checkpoint may have been saved from the bare base model or with a head that is not here, may
    leave out tied weights, and may use names that transformers has since changed.

    Raises:
        CheckpointError: A parameter is in no file, or has another shape there.
    """
    values = model.state_dict(keep_vars=True)
    found = {name: stored for stored, name in _renamed(model, checkpoint) if name in values}
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
        _check_shape(name, values[name], stored, checkpoint)
    return found


def unread(
    checkpoint: Checkpoint, stored: Mapping[str, str], widths: Set[int]
) -> Iterator[tuple[str, Entry]]:
    """Yield tensors that no module reads, by name, of which an axis has one of these sizes.

    ``stored``: what :func:`stored_names` returns.
    """
    for name in sorted(checkpoint.entries.keys() - {*stored.values()}):
        if widths & {*checkpoint.entries[name].shape}:
            yield name, checkpoint.entries[name]


def _renamed(model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yield each stored name with the name that transformers would load it under.

    That of an expert's matrix, which transformers puts into a fused tensor, is of our linear.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    experts = {
        f"{name.rpartition('.')[0]}.{fused}"
        for name, module in model.named_modules()
        if isinstance(module, Expert)
        for fused in PARTS
    }
    prefix = model.base_model_prefix
    names = model.state_dict() | dict.fromkeys(experts, True)
    for stored in checkpoint.entries:
        name, source = rename_source_key(stored, renamings, converters, prefix, names)
        owner, _, fused = name.rpartition(".")
        if source is None and name in experts:
            raise CheckpointError(
                f"{checkpoint.entries[stored].file}: {stored} holds all experts in one tensor; "
                "only files with a matrix for each can be read. save_pretrained writes such."
            )
        if source is not None and name in experts:
            sources = next(
                part.source_patterns for part in converters if source in part.source_patterns
            )
            # …experts.7.w1.weight
            number, part = stored.split(".")[-3], PARTS[fused][sources.index(source)]
            name = f"{owner}.{number}.{part}.weight"
        yield stored, name


def _check_shape(name: str, value: Tensor, stored: str, checkpoint: Checkpoint) -> None:
    entry = checkpoint.entries[stored]
    if entry.shape != tuple(value.shape):
        raise CheckpointError(
            f"{entry.file}: {stored} has shape {list(entry.shape)}, but config.json makes "
            f"{name} {list(value.shape)}. The config belongs to another model."
        )


def _buffers(module: nn.Module, left_out: set[nn.Module]) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (child, name, buffer)
        for child in module.modules()
        if child not in left_out
        for name, buffer in child._buffers.items()
        if buffer is not None
    ]
