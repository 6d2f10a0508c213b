"""Model families: one file of data each, found by ``config.model_type``, else by probing.

Other distributions add families through the entry point group ``prunekit.architectures``; their
declaration of a model type takes the place of ours.
"""

from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points

from transformers import PreTrainedModel

from prunekit.architectures.base import Architecture, Attention, FeedForward, Stack, Stage, Stream
from prunekit.architectures.coverage import ADVICE, check, holds
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
    "declared",
    "find",
    "names",
]


def find(model: PreTrainedModel) -> Architecture:
    """Return the architecture of ``model``, with those stacks that the model has.

    Args:
        model: PreTrainedModel transformers model, with or without a head; the meta device will do.

    Raises:
        CheckpointError: The model holds something in its blocks that would not be pruned, or its
            type is not declared and cannot be probed.
    """
    architecture = declared(model) or probe(model)
    for stack in architecture.stacks:
        check(model, stack)
    return architecture


def declared(model: PreTrainedModel) -> Architecture | None:
    """Return the architecture that is declared for the type of ``model``, as :func:`find`."""
    known = _declared().get(model.config.model_type)
    return _present(model, known) if known else None


def names() -> list[str]:
    """Return the declared model types in alphabetic order."""
    return sorted(_declared())


@cache
def _declared() -> dict[str, Architecture]:
    found = [value for module in modules(__name__) for value in vars(module).values()]
    found += [entry.load() for entry in entry_points(group=__name__)]
    return {
        model_type: architecture
        for architecture in found
        if isinstance(architecture, Architecture)
        for model_type in architecture.model_types
    }


def _present(model: PreTrainedModel, architecture: Architecture) -> Architecture:
    stacks = tuple(stack for stack in architecture.stacks if holds(model.base_model, stack.blocks))
    if not stacks:
        raise CheckpointError(
            f"{type(model).__name__}: no blocks at "
            f"{' or '.join(stack.blocks for stack in architecture.stacks)}, where models of type "
            f"{model.config.model_type!r} keep them. {ADVICE}"
        )
    return replace(architecture, stacks=stacks)
