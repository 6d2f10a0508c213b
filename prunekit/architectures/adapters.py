"""Adapter layers of peft in a model.

peft is not imported: its layers are known by their attributes. A layer that adapts a module holds
it as ``base_layer``; one whose module is trained as a whole holds copies as ``modules_to_save``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from prunekit.errors import ConfigError


def bare_model(model: Any) -> Any:  # noqa: ANN401  any object, returned if it is no model of peft
    """Return the model inside a model of peft, with its adapter layers.

    Raises:
        ConfigError: peft adds inputs to it instead of layers.
    """
    classes = {each.__name__ for each in type(model).__mro__}
    if "PeftModel" in classes:
        config = model.active_peft_config
        if config.is_prompt_learning:
            raise ConfigError(
                f"model: its adapter adds inputs ({config.peft_type}), which are no part of its "
                "weights. Pass the model without it: model.get_base_model()."
            )
        return bare_model(model.base_model)
    return model.model if "BaseTuner" in classes else model


def is_adapter_layer(module: nn.Module) -> bool:
    """Return whether peft put this module in the place of another."""
    return hasattr(type(module), "adapter_layer_names")


def base_layer(module: nn.Module) -> nn.Module:
    """Return the module that an adapter layer adapts; other modules unchanged."""
    while is_adapter_layer(module) and "base_layer" in module._modules:
        module = cast("nn.Module", module.base_layer)
    return module


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the adapter layers of a model by their path in it."""
    return {path: parent._modules[name] for parent, name, path in _places(model)}  # pyright: ignore


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Replace adapter layers by the modules they adapt, within the context.

    Where such a module is replaced in the context, its adapters are lost with it.
    """
    layers = [(parent, name, parent._modules[name]) for parent, name, _ in _places(model)]
    used = [_module_in_use(cast("nn.Module", layer)) for _, _, layer in layers]
    for (parent, name, _), module in zip(layers, used, strict=True):
        parent._modules[name] = module
    try:
        yield
    finally:
        for (parent, name, layer), module in zip(layers, used, strict=True):
            if parent._modules.get(name) is module:
                parent._modules[name] = layer


def _module_in_use(layer: nn.Module) -> nn.Module:
    """Return the adapted module, or its copy that is trained."""
    if "original_module" not in layer._modules:
        return base_layer(layer)
    copies = cast("nn.ModuleDict", layer._modules.get("modules_to_save", {}))
    active = [] if layer.disable_adapters else layer.active_adapters
    used = [copies[name] for name in active if name in copies]  # pyright: ignore
    return used[0] if used else cast("nn.Module", layer.original_module)


def _places(module: nn.Module, path: str = "") -> Iterator[tuple[nn.Module, str, str]]:
    """Yield the parent, name and path of each adapter layer."""
    for name, child in module._modules.items():
        if child is not None and is_adapter_layer(child):
            yield module, name, path + name
        elif child is not None:
            yield from _places(child, f"{path}{name}.")
