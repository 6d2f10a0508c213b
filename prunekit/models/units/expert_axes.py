"""Tensors and numbers of a model that grow with its experts.

They are found by comparing two stock models. One is built from the config as it is, one with twice
as many experts: each tensor outside of the experts that is larger there has one row for each
expert, and each number that is twice as large counts them. So no family's router is named here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from prunekit.architectures.expert_layout import expert_layout
from prunekit.errors import ShapeError
from prunekit.models import stock
from prunekit.models.attention_hook import module_configs
from prunekit.models.units.meta_model import meta_model


@dataclass(frozen=True)
class ExpertCount:
    """Where a model states and uses the number of its experts.

    Attributes:
        entry: Keys that lead to it in ``config.json``.
        count: The number.
        axes: Axis of the experts of each tensor outside of them, by its full name.
        numbers: Module and name of each attribute that is the number.
    """

    entry: tuple[str, ...]
    count: int
    axes: Mapping[str, int]
    numbers: tuple[tuple[str, str], ...]

    def entries(self, config: PreTrainedConfig, count: int) -> dict[str, Any]:
        """Return the entries of a config with another number of experts."""
        return _entries(config.to_dict(), self.entry, count)

    def apply(self, model: PreTrainedModel, count: int) -> None:
        """Set another number in the modules and configs of a model."""
        for path, name in self.numbers:
            setattr(model.get_submodule(path), name, count)
        target: Any = model.config
        for name in self.entry[:-1]:
            target = getattr(target, name)
        held = [part for each in module_configs(model) for part in stock.config_parts(each)]
        for config in held:
            if type(config) is type(target) and getattr(config, self.entry[-1]) == self.count:
                setattr(config, self.entry[-1], count)


def expert_count(model: PreTrainedModel, names: Sequence[str], count: int) -> ExpertCount:
    """Return where a model states and uses the number of its experts.

    Args:
        model: The model, with or without weights.
        names: Full names of all modules of experts.
        count: Number of experts in each.

    Raises:
        ShapeError: No entry of the config is the number, or something else depends on it.
    """
    usual = meta_model(model, {}, "experts")
    for entry in _candidates(model.config.to_dict(), count):
        try:
            more = meta_model(model, _entries(model.config.to_dict(), entry, 2 * count), "experts")
        except ShapeError:
            continue
        if all(_number(more.get_submodule(name)) == 2 * count for name in names):
            axes = dict(_growing_axes(usual, more, names, count))
            return ExpertCount(entry, count, axes, tuple(_numbers(usual, more, count)))
    raise ShapeError(
        f"experts: no single entry of a config of type {model.config.model_type!r} is their "
        f"number, {count}, in all of its layers, so none can be removed."
    )


def _candidates(values: Mapping[str, Any], count: int) -> list[tuple[str, ...]]:
    """Return the entries with a value, those named after experts first."""
    found = [*_paths_of(values, count)]
    return sorted(found, key=lambda path: "expert" not in path[-1])


def _paths_of(values: Mapping[str, Any], count: int) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((key, *path) for path in _paths_of(value, count))
        elif type(value) is int and value == count:
            yield (key,)


def _entries(values: Mapping[str, Any], path: Sequence[str], count: int) -> dict[str, Any]:
    """Return the outermost entry that holds a value, with another one."""
    first, *rest = path
    return {first: {**values[first], **_entries(values[first], rest, count)} if rest else count}


def _number(module: nn.Module) -> int:
    layout = expert_layout(module)
    assert layout is not None
    return layout.count(module)


def _growing_axes(
    usual: PreTrainedModel, more: PreTrainedModel, names: Sequence[str], count: int
) -> Iterator[tuple[str, int]]:
    """Yield each tensor outside of the experts with their axis.

    Raises:
        ShapeError: It is larger, but not by one row for each expert.
    """
    larger, inside = tensors(more), tuple(f"{name}." for name in names)
    for name, tensor in tensors(usual).items():
        before, after = tensor.shape, larger[name].shape if name in larger else None
        if name.startswith(inside) or before == after:
            continue
        axes = [
            axis
            for axis, size in enumerate(before)
            if after is not None and len(after) == len(before) and after[axis] != size
        ]
        if len(axes) != 1 or before[axes[0]] != count:
            raise ShapeError(
                f"{name}: is {list(before)} with {count} experts and "
                f"{list(after) if after else 'absent'} with {2 * count}, which is more than a row "
                "for each expert. They cannot be taken out."
            )
        yield name, axes[0]


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return all parameters and buffers of a model by full name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _numbers(
    usual: PreTrainedModel, more: PreTrainedModel, count: int
) -> Iterator[tuple[str, str]]:
    """Yield module and name of each number that follows the experts.

    Raises:
        ShapeError: A number follows it in another way.
    """
    for path, module in usual.named_modules():
        after = vars(more.get_submodule(path))
        for name, value in vars(module).items():
            if not isinstance(value, int | float) or value == after[name]:
                continue
            if (value, after[name]) != (count, 2 * count):
                raise ShapeError(
                    f"{path}: {name} is {value} with {count} experts and {after[name]} with "
                    f"{2 * count}, so nothing says which of them are experts. They cannot be taken "
                    "out."
                )
            yield path, name
