"""Entries of a config by name, also of its parts, such as ``text_config.num_hidden_layers``."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from prunekit.architectures import Stack
from prunekit.architectures.block_lists import config_part, parts_of
from prunekit.models.attention_hook import module_configs


def entry_name(config: PreTrainedConfig, stack: Stack, name: str) -> str:
    """Return the full name that this family gives to a common entry."""
    own: PreTrainedConfig = config_part(config, stack.config)
    return stack.entry(own.attribute_map.get(name, name))


def with_entries(values: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries of a config after changes, given by full names."""
    changed = dict(values)
    for name, value in entries.items():
        first, _, rest = name.partition(".")
        changed[first] = with_entries(changed[first], {rest: value}) if rest else value
    return changed


def set_config_entries(model: PreTrainedModel, entries: Mapping[str, Any]) -> None:
    """Set entries of a model's config and of modules' copies.

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
