"""A model without weights, whose modules are given theirs one after another from a checkpoint."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.checkpoint.adapter import Adapter
from prunekit.checkpoint.reader import Checkpoint
from prunekit.models.sequential.prefetch import Fetch
from prunekit.models.weight_names import stored_names


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


def _buffers(module: nn.Module, left_out: set[nn.Module]) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (child, name, buffer)
        for child in module.modules()
        if child not in left_out
        for name, buffer in child._buffers.items()
        if buffer is not None
    ]


@contextmanager
def loaded_weights(weights: Weights | None, *modules: nn.Module) -> Iterator[None]:
    """Load the weights of modules for the time of a ``with`` block; None: they have their own."""
    if weights is None:
        yield
        return
    for module in modules:
        weights.load(module)
    try:
        yield
    finally:
        for module in modules:
            weights.drop(module)
