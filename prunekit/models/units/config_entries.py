"""Entries of a config by name, also of its parts, such as ``text_config.num_hidden_layers``."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from prunekit.architectures import Stack
from prunekit.architectures.block_lists import parts_of
from prunekit.models.attention_hook import module_configs


def config_part(config: Any, path: str) -> Any:  # noqa: ANN401  a config, or its entries
    """Return the part of a config, or of its entries, that a dotted path names; "" is the whole."""
    for name in filter(None, path.split(".")):
        config = config[name] if isinstance(config, Mapping) else getattr(config, name)
    return config


def entry_name(config: PreTrainedConfig, stack: Stack, name: str) -> str:
    """Return the full name of a common entry of a stack, as this family calls it."""
    own: PreTrainedConfig = config_part(config, stack.config)
    return f"{stack.config}.{own.attribute_map.get(name, name)}".lstrip(".")


def with_entries(values: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries of a config with some of them, given by full names, changed."""
    changed = dict(values)
    for name, value in entries.items():
        first, _, rest = name.partition(".")
        changed[first] = with_entries(changed[first], {rest: value}) if rest else value
    return changed


def set_config_entries(model: PreTrainedModel, entries: Mapping[str, Any]) -> None:
    """Set entries of a model's config, also in the copies of it or its part that modules hold.

    Other parts of the same class, such as of encoder and decoder, are left alone.
    """
    configs = module_configs(model)
    for name, value in entries.items():
        path, _, key = name.rpartition(".")
        part = config_part(model.config, path)
        others = [id(each) for _, each in parts_of(model.config) if each is not part]
        for config in [part, *configs]:
            if type(config) is type(part) and id(config) not in others:
                setattr(config, key, value)
