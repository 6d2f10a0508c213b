"""Prunes a model that is already in memory.

Shapes: N samples, T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.architectures import find
from prunekit.config.prune_table import Prune
from prunekit.errors import ConfigError
from prunekit.models.experts import unfused
from prunekit.models.layout import Block, Selection, layout, runners
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.pipeline import LoadedBlock, batches, iterate_blocks
from prunekit.sparsify.block_pruner import BlockPruner
from prunekit.sparsify.calibrate import survey
from prunekit.sparsify.permute_channels import check_permutable, orders, rearrange
from prunekit.sparsify.permute_residual import reorder, residual_axes, residual_order
from prunekit.sparsify.recipe import Recipe
from prunekit.structured.batches import still


def prune(
    model: PreTrainedModel,
    tokens: Int[Tensor, "N T"] | None = None,
    *,
    method: str = "admm",
    pattern: str = "unstructured",
    **settings: Any,  # noqa: ANN401  the keys of [prune]
) -> list[dict[str, Any]]:
    """Prune a model in place, block by block, and return what became of each linear.

    Args:
        model: A transformers model on one device.
        tokens: Calibration samples; None for a method that looks at weights alone.
        method: Its name; see ``prunekit list``.
        pattern: "unstructured", "2:4", "block:16x16", "row", "column".
        settings: Other keys of ``[prune]`` and of the method, such as ``sparsity=0.5``.

    Returns:
        One entry a linear: name, shape, sparsity, relative_error, seconds.

    Raises:
        ConfigError: A setting cannot be meant.
        PrunekitError: See each kind.
    """
    section = _section({"method": method, "pattern": pattern, **settings})
    recipe = Recipe.of(section, calibrated=tokens is not None)
    if tokens is None and (user := _reader(section)):
        raise ConfigError(f"{user}: needs calibration tokens; pass tokens=[N, T].")
    if section.recover == "lowrank":
        raise ConfigError(
            "recover lowrank: writes an adapter beside a checkpoint, so it needs a run: "
            "prunekit.run(prunekit.plan(config))."
        )
    with unfused(model):
        return _prune(model, tokens, section, recipe)


def _prune(
    model: PreTrainedModel, tokens: Int[Tensor, "N T"] | None, section: Prune, recipe: Recipe
) -> list[dict[str, Any]]:
    stacks = runners(model, find(model))
    if recipe.permute:
        check_permutable(model, stacks)
    axes = residual_axes(model) if recipe.permute == "residual" else {}
    blocks = layout(stacks, Selection(section.pattern, section.skip, section.on_indivisible))
    recipe.check(blocks)
    ids = torch.zeros(1, 1, dtype=torch.int64) if tokens is None else tokens

    def visits(*, beside: bool = False) -> Iterator[tuple[LoadedBlock, Block]]:
        walked = iterate_blocks(model, stacks, None, batches(ids, model.device), beside=beside)
        return zip(walked, blocks, strict=True)

    pruned = [linear for block in blocks for linear in block.pruned]
    dtypes = {linear.name: model.get_parameter(f"{linear.name}.weight").dtype for linear in pruned}
    with still(model), _uncached(model, stacks):
        sparsities = section.allocation.allocate(
            {linear.name: linear.size for linear in pruned},
            survey(visits, section.allocation, section.pattern),
            section.sparsity,
        )
        if axes and (found := residual_order(visits(), blocks, axes, recipe)):
            reorder(model, axes, found)
        pruner = BlockPruner(recipe, sparsities, dtypes)
        entries = []
        for visit, block in visits(beside=recipe.runs_dense_model):
            rearrange(visit, orders(visit, block, recipe))
            entries += [outcome.entry for outcome in pruner.prune(visit, block)]
        return entries


def _reader(section: Prune) -> str | None:
    """Return what of a section needs calibration tokens, if anything does."""
    users = {
        "target dense": section.target == "dense",
        f"recover {section.recover}": section.recover,
        "permute": section.permute,
        f"refine {section.refine}": section.refine,
        f"method {section.method.name}": section.method.needs,
        f"allocation {section.allocation.name}": section.allocation.needs,
    }
    return next((user for user, needs in users.items() if needs), None)


@contextmanager
def _uncached(model: PreTrainedModel, stacks: Sequence[StackRunner]) -> Iterator[None]:
    """Hold a model without a cache; afterwards it is as it was."""
    configs = [model.config, *(runner.module.config for runner in stacks)]
    caching = [config for config in configs if getattr(config, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


def _section(values: dict[str, Any]) -> Prune:
    try:
        return Prune.model_validate(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigError("\n".join(lines)) from error
