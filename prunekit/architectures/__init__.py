"""Model families, one data file each, selected by ``config.model_type``.

Model types without a declaration are probed. Other distributions add families through the entry
point group ``prunekit.architectures``; for a model type that both declare, theirs is used.
"""

from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points

from transformers import PreTrainedModel

from prunekit.architectures.adapters import without_adapters
from prunekit.architectures.base import Architecture, Attention, FeedForward, Stack, Stage, Stream
from prunekit.architectures.coverage import ADVICE, check_coverage, has_module
from prunekit.architectures.probing import probe
from prunekit.errors import CheckpointError
from prunekit.plugins import modules

__all__ = [
    "Architecture",
    "Attention",
    "FeedForward",
    "Stack",
    "Stage",
    "Stream",
    "declared_architecture",
    "declared_model_types",
    "find_architecture",
]


def find_architecture(model: PreTrainedModel) -> Architecture:
    """Return the declared or probed architecture, restricted to stacks the model has.

    Args:
        model: A transformers model, with or without a head; it may be on the meta device, or have
            adapters of peft.

    Raises:
        CheckpointError: Its blocks contain a linear or fused weight that no stage covers, they lack
            a linear that a stage names, or its type is not declared and cannot be probed.
    """
    with without_adapters(model):
        architecture = declared_architecture(model) or probe(model)
        for stack in architecture.stacks:
            check_coverage(model, stack)
    return architecture


def declared_architecture(model: PreTrainedModel) -> Architecture | None:
    """Return the architecture declared for the model type, or None.

    Raises:
        CheckpointError: None of the declared stacks exists in the model.
    """
    known = _architectures_by_type().get(model.config.model_type)
    return _with_existing_stacks(model, known) if known else None


def declared_model_types() -> list[str]:
    """Return the declared model types in alphabetical order."""
    return sorted(_architectures_by_type())


@cache
def _architectures_by_type() -> dict[str, Architecture]:
    found = [value for module in modules(__name__) for value in vars(module).values()]
    found += [entry.load() for entry in entry_points(group=__name__)]
    return {
        model_type: architecture
        for architecture in found
        if isinstance(architecture, Architecture)
        for model_type in architecture.model_types
    }


def _with_existing_stacks(model: PreTrainedModel, architecture: Architecture) -> Architecture:
    stacks = tuple(
        stack for stack in architecture.stacks if has_module(model.base_model, stack.blocks)
    )
    if not stacks:
        raise CheckpointError(
            f"{type(model).__name__}: no blocks at "
            f"{' or '.join(stack.blocks for stack in architecture.stacks)}, where models of type "
            f"{model.config.model_type!r} keep them. {ADVICE}"
        )
    return replace(architecture, stacks=stacks)
