"""Changes of objects that are made whole or not at all."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

Namespace = dict[Any, Any]
"""Attributes of an object by name, or another dictionary."""


@contextmanager
def all_or_nothing(namespaces: Iterable[Namespace]) -> Iterator[None]:
    """Restore dictionaries, and containers in them, if the context fails.

    Values themselves are not copied: tensors have to be replaced inside the context, not changed.

    Args:
        namespaces: Every dictionary whose entries change.
    """
    saved = [
        (container, container.copy())
        for namespace in namespaces
        for container in (namespace, *namespace.values())
        if isinstance(container, dict | list | set)
    ]
    try:
        yield
    except BaseException:
        for container, content in saved:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        raise


def namespaces_of(model: PreTrainedModel) -> list[Namespace]:
    """Return the attributes of all modules and configs of a model."""
    modules = [vars(module) for module in model.modules()]
    configs: dict[int, Namespace] = {}
    unseen = [value for each in modules for value in each.values()]
    while unseen:
        value = unseen.pop()
        if isinstance(value, PretrainedConfig) and id(value) not in configs:
            configs[id(value)] = vars(value)
            unseen += vars(value).values()
    return [*modules, *configs.values()]
