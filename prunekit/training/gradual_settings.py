"""Settings of gradual pruning, checked before training begins."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel

from prunekit.allocations.schedules import PruneSchedule
from prunekit.architectures.adapters import bare_model
from prunekit.config.prune_table import Prune
from prunekit.errors import ConfigError
from prunekit.models.in_memory import check_in_memory, check_unflattened
from prunekit.models.layout import Linear
from prunekit.patterns import Pattern
from prunekit.patterns.n_of_m import NOfM
from prunekit.sparsify.in_memory import prune_table
from prunekit.training.weight_views import check_experts

NOT_GRADUAL = ("steps", "initial_sparsity", "recover", "permute")
"""Keys of ``[prune]`` that do not apply while training."""


def zeros_of(pattern: Pattern, linear: Linear, sparsity: float) -> int:
    """Return the number of zeros that a pattern has in a linear.

    Args:
        pattern: The pattern of the config.
        linear: The linear.
        sparsity: Its sparsity, which may choose another n of m.
    """
    if not sparsity:
        return 0
    keep = pattern.at(sparsity).keep(torch.zeros(linear.outputs, linear.inputs), sparsity)
    return int((~keep).sum())


def unwrapped_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model within wrappers of parallel training.

    Raises:
        ConfigError: There is none, or its weights are sharded in a way that hides their rows.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: a {type(model).__name__} is not a model.")
    inner: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    inner = bare_model(inner)
    check_in_memory(inner)
    check_unflattened(inner)
    check_experts(inner)
    return inner


def gradual_section(
    method: str, pattern: str, sparsity: float | None, settings: Mapping[str, Any]
) -> Prune:
    """Return the table ``[prune]`` of arguments of a gradual pruner.

    Args:
        method: Name of the method.
        pattern: Spelling of the pattern.
        sparsity: Fraction of zeros at the end, or None.
        settings: Further keys.

    Raises:
        ConfigError: A key or a value is invalid, or does not apply while training.
    """
    if wrong := [key for key in NOT_GRADUAL if key in settings]:
        raise ConfigError(f"{wrong[0]}: does not apply while a model is trained; leave it out.")
    values = {"method": method, "pattern": pattern, "measure_error": False, **settings}
    if sparsity is not None:
        values["sparsity"] = sparsity
    section = prune_table(values)
    if getattr(section.method, "order", "given") != "given":
        raise ConfigError('order: a sweep while training needs "given".')
    return section


def gradual_schedule(section: Prune, name: str | None, steps: Mapping[str, Any]) -> PruneSchedule:
    """Return the schedule to the sparsity of a table ``[prune]``.

    Args:
        section: The table.
        name: one-shot, linear or cubic; None for the default.
        steps: Further arguments of :class:`PruneSchedule`.

    Raises:
        ConfigError: It is not one-shot, and the pattern has one sparsity.
    """
    fixed = isinstance(section.pattern, NOfM)
    if fixed and name not in {None, "one-shot"}:
        raise ConfigError(
            f'schedule: "{section.pattern.name}" has one sparsity, so it is reached in one step; '
            'choose "one-shot".'
        )
    name = name or ("one-shot" if fixed else "cubic")
    return PruneSchedule(name, section.sparsity, **steps)


def zeros_message(place: str, sparsity: float, zeros: float) -> str:
    """Return the message about a sparsity below that of the weights.

    Args:
        place: Name of the layer, or of all.
        sparsity: The sparsity asked for.
        zeros: Fraction of the weights that are zero.
    """
    return (
        f"sparsity: {sparsity:g} is below the zeros that {place} has, {zeros:g} (in some group of "
        "the pattern at least), and none of them returns. Choose a higher sparsity."
    )
