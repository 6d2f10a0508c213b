"""A model without weights, whose modules are given theirs one after another from a checkpoint."""

import re
from collections.abc import Iterable

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from prunekit.checkpoint import Checkpoint
from prunekit.errors import CheckpointError


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the model that ``config.json`` describes on the meta device: its shape, no weight.

    Buffers that no checkpoint stores (rotary frequencies) are real.

    Raises:
        CheckpointError: transformers does not know the model, or only by code that came with it.
    """
    where = checkpoint.folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{where}: transformers {transformers.__version__} cannot read it: {error} "
            "Code that comes with a checkpoint is never run."
        ) from error
    config.use_cache = False
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    if names and kind is None:
        raise CheckpointError(
            f"{where}: transformers {transformers.__version__} has no {names[0]!r}."
        )
    with init_empty_weights(include_buffers=False):
        if kind is None:
            return AutoModel.from_config(config, dtype=torch.float32).eval()
        return kind._from_config(config, dtype=torch.float32).eval()


class Weights:
    """Gives modules of an empty model their weights from a checkpoint, and takes them away."""

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.stored = stored_names(model, checkpoint)
        self._prefixes = {module: name for name, module in model.named_modules()}

    def load(self, module: nn.Module, *, without: Iterable[nn.Module] = ()) -> None:
        """Give a module's parameters and persistent buffers their stored values.

        ``without``: submodules that are left empty.
        """
        left_out = {child for excluded in without for child in excluded.modules()}
        wanted = {
            (child, name): self.stored[self._name(child, name)]
            for child in module.modules()
            if child not in left_out
            for name in [*child._parameters, *child._buffers]
            if self._name(child, name) in self.stored
        }
        tensors = self.checkpoint.read(set(wanted.values()))
        for child, name, buffer in _buffers(module, left_out):
            child._buffers[name] = buffer.to(self.device)
        for (child, name), stored in wanted.items():
            self.assign(child, name, tensors[stored])

    def assign(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Put ``value`` where ``module.name`` is, in the type and on the device of the run."""
        value = value.to(self.device, self.dtype if value.is_floating_point() else None)
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


def stored_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Return, for each parameter and stored buffer of the model, its name in the checkpoint.

    A checkpoint may have been saved from the bare base model or with a head that is not here, may
    leave out tied weights, and old ones call a norm's weight ``gamma`` and its bias ``beta``.

    Raises:
        CheckpointError: A parameter is in no file, or has another shape there.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    tied = {**tied, **{source: target for target, source in tied.items() if source not in tied}}
    found, missing = {}, []
    for name, value in model.state_dict(keep_vars=True).items():
        stored = _spelling(name, model.base_model_prefix, checkpoint)
        if stored is None and name in tied:
            stored = _spelling(tied[name], model.base_model_prefix, checkpoint)
        if stored is not None:
            found[name] = stored
            _check_shape(name, value, stored, checkpoint)
        elif isinstance(value, nn.Parameter):
            missing.append(name)
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}: has no {missing[0]}"
            + (f" and lacks {len(missing) - 1} more tensors" if len(missing) > 1 else "")
            + f" that {type(model).__name__} needs. It is incomplete or of another architecture."
        )
    return found


def _spelling(name: str, prefix: str, checkpoint: Checkpoint) -> str | None:
    bare = name.removeprefix(f"{prefix}.")
    for candidate in (name, bare, f"{prefix}.{name}"):
        old = re.sub(r"\.weight$", ".gamma", re.sub(r"\.bias$", ".beta", candidate))
        for spelling in (candidate, old):
            if spelling in checkpoint.entries:
                return spelling
    return None


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
