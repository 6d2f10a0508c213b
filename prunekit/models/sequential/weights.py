"""Load modules of a model from a checkpoint, and drop them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.checkpoint.adapter import Adapter
from prunekit.checkpoint.reader import Checkpoint
from prunekit.models.computed import computed_buffers
from prunekit.models.orientation import weight_matrix
from prunekit.models.sequential.prefetch import Fetch
from prunekit.models.weight_names import stored_names


class Weights:
    """Loads weights into modules of an empty model, and drops them.

    Attributes:
        adapters: Low-rank adapters that are added to the weights of linears, by their names.
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
        parameters = dict(model.named_parameters(remove_duplicate=False)).keys()
        self._parameters = {self.stored[name] for name in parameters & self.stored.keys()}
        for name, value in computed_buffers(model).items():
            path, _, attribute = name.rpartition(".")
            model.get_submodule(path)._buffers[attribute] = value.to(dtype)
        self._prefixes = {module: name for name, module in model.named_modules()}
        for module in model.modules():
            if _is_lookup(module):
                # A function without state of this object: a block may be copied with its hooks.
                module.register_forward_hook(partial(_cast, dtype))

    def load(self, module: nn.Module, *, without: Iterable[nn.Module] = ()) -> None:
        """Load a module's parameters and persistent buffers.

        ``without``: submodules that are left empty.

        Raises:
            NumericsError: A parameter holds NaN or inf.
        """
        excluded_modules = {child for excluded in without for child in excluded.modules()}
        stored_of = self._stored_names(module, excluded_modules)
        names = set(stored_of.values())
        tensors = self._take_fetched(names)
        read = self.checkpoint.read(names - tensors.keys())
        self.check_finite(read)
        tensors |= read
        for child, name, buffer in _buffers(module, excluded_modules):
            child._buffers[name] = buffer.to(self.device)
        for (child, name), stored in stored_of.items():
            self.assign(child, name, tensors[stored])
            if name == "weight" and (adapter := self.adapters.get(self._prefixes[child])):
                weight_matrix(child).add_(adapter.product.to(self.device))

    def check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse parameters that hold NaN or inf.

        Buffers and unused tensors may hold them.

        Raises:
            NumericsError: A parameter holds NaN or inf.
        """
        for name in tensors.keys() & self._parameters:
            self.checkpoint.check_finite(name, tensors[name])

    def fetch(self, module: nn.Module) -> None:
        """Prefetch the module that :meth:`load` will load next, in the background."""
        if self._fetch:
            self._fetch.cancel()
        names = self._stored_names(module, set()).values()
        self._fetch = Fetch(self.checkpoint, names, self.device, self.check_finite)
        self._fetch.start()

    def _take_fetched(self, names: set[str]) -> dict[str, Tensor]:
        if self._fetch is None or self._fetch.names != names:
            return {}
        fetch, self._fetch = self._fetch, None
        return fetch.take()

    def _stored_names(
        self, module: nn.Module, excluded_modules: set[nn.Module]
    ) -> dict[tuple[nn.Module, str], str]:
        """Return the stored name of each parameter and buffer."""
        return {
            (child, name): self.stored[self._name(child, name)]
            for child in module.modules()
            if child not in excluded_modules
            for name in [*child._parameters, *child._buffers]
            if self._name(child, name) in self.stored
        }

    def assign(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Set a parameter or buffer, with dtype and device of the run.

        Args:
            module: The module.
            name: Name of the parameter or buffer.
            value: Its new value.
        """
        cast = value.is_floating_point() and not _is_lookup(module)
        value = value.to(self.device, self.dtype if cast else None)
        if name in module._parameters:
            value = nn.Parameter(value, requires_grad=False)
            module._parameters[name] = value
        else:
            module._buffers[name] = value

    def drop(self, module: nn.Module) -> None:
        """Replace the parameters of a module by meta tensors."""
        for child in module.modules():
            for name, value in child._parameters.items():
                if value is not None:
                    child._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)

    def _name(self, module: nn.Module, name: str) -> str:
        prefix = self._prefixes[module]
        return f"{prefix}.{name}" if prefix else name


def _cast(dtype: torch.dtype, _: nn.Module, __: tuple, rows: Tensor) -> Tensor:
    return rows.to(dtype)


def _is_lookup(module: nn.Module) -> bool:
    """Return whether a module only selects rows of its weight.

    Its weight keeps the stored dtype, and on a CPU remains mapped from the file: rows are cast when
    they are selected, so a vocabulary is never copied. Subclasses may compute with the weight, as
    Gemma's does.
    """
    return type(module) is nn.Embedding


def _buffers(
    module: nn.Module, excluded_modules: set[nn.Module]
) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (child, name, buffer)
        for child in module.modules()
        if child not in excluded_modules
        for name, buffer in child._buffers.items()
        if buffer is not None
    ]


@contextmanager
def loaded_weights(weights: Weights | None, *modules: nn.Module) -> Iterator[None]:
    """Load modules for a ``with`` block; without ``weights`` do nothing."""
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
