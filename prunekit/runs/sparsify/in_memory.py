"""Prune a model that is already in memory.

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

from prunekit.architectures import find_architecture
from prunekit.config.messages import explain
from prunekit.config.prune_table import Prune
from prunekit.errors import ConfigError
from prunekit.methods import Method, methods
from prunekit.models.experts import unfused
from prunekit.models.in_memory import check_in_memory
from prunekit.models.layout import Block, LinearSelection, list_blocks, stack_runners
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.models.sequential.pipeline import OutputsRead, iterate_blocks, split_batches
from prunekit.sparsify.block_pruner import BlockPruner
from prunekit.sparsify.calibrate import make_survey
from prunekit.sparsify.permute_channels import channel_orders, check_permutable, permute_channels
from prunekit.sparsify.permute_residual import permute_residual, residual_axes, residual_order
from prunekit.sparsify.recipe import Recipe
from prunekit.structured.batches import eval_mode
from prunekit.structured.token_ids import token_ids


def prune(
    model: PreTrainedModel,
    tokens: Int[Tensor, "N T"] | None = None,
    *,
    method: str = "admm",
    pattern: str = "unstructured",
    **settings: Any,  # noqa: ANN401  the keys of [prune]
) -> list[dict[str, Any]]:
    """Prune a model in place, block by block; return measurements.

    Args:
        model: A transformers model on one device.
        tokens: Calibration samples; None for a method that needs weights alone.
        method: Its name; see ``prunekit list``.
        pattern: "unstructured", "2:4", "block:16x16", "row", "column".
        settings: Other keys of ``[prune]`` and of the method, such as ``sparsity=0.5``.

    Returns:
        A record of each linear: name, shape, sparsity, relative_error, seconds.

    Raises:
        ConfigError: A setting is invalid, or needs calibration tokens that were not passed.
        PrunekitError: The model cannot be pruned so; see each kind of error.
    """
    check_in_memory(model)
    section = _section({"method": method, "pattern": pattern, **settings})
    tokens = None if tokens is None else token_ids(tokens, model)
    recipe = Recipe.of(section, calibrated=tokens is not None)
    if tokens is None and (user := section.calibration_user):
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
    stacks = stack_runners(model, find_architecture(model))
    if recipe.permute:
        check_permutable(model, stacks)
    axes = residual_axes(model) if recipe.permute == "residual" else {}
    blocks = list_blocks(
        stacks, LinearSelection(section.pattern, section.skip, section.on_indivisible)
    )
    recipe.check(blocks)
    ids = torch.zeros(1, 1, dtype=torch.int64) if tokens is None else tokens

    def iterate(
        outputs_read: OutputsRead, *, with_dense: bool = False
    ) -> Iterator[tuple[LoadedBlock, Block]]:
        parts = split_batches(ids, model.device)
        loaded = iterate_blocks(
            model, stacks, None, parts, with_dense=with_dense, outputs_read=outputs_read
        )
        return zip(loaded, blocks, strict=True)

    pruned = [linear for block in blocks for linear in block.pruned]
    dtypes = {linear.name: model.get_parameter(f"{linear.name}.weight").dtype for linear in pruned}
    survey_reads: OutputsRead = "all" if section.allocation.needs else "none"
    with eval_mode(model), _uncached(model, stacks):
        sparsities = section.allocation.allocate(
            {linear.name: linear.size for linear in pruned},
            make_survey(lambda: iterate(survey_reads), section.allocation, section.pattern),
            section.sparsity,
        )
        if axes and (order := residual_order(iterate("all"), blocks, axes, recipe)):
            permute_residual(model, axes, order)
        pruner = BlockPruner(recipe, sparsities, dtypes)
        records = []
        for loaded, block in iterate(recipe.outputs_read, with_dense=recipe.runs_dense_model):
            permute_channels(loaded, channel_orders(loaded, block, recipe))
            records += [result.as_record() for result in pruner.prune(loaded, block)]
        return records


@contextmanager
def _uncached(model: PreTrainedModel, stacks: Sequence[StackRunner]) -> Iterator[None]:
    """Turn off key-value caches for the time of a ``with`` block."""
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
        chosen = methods().get(str(values["method"]), Method)
        allowed = dict.fromkeys([*Prune.model_fields, *chosen.model_fields], "")
        lines = []
        for details in error.errors():
            key = next(part for part in reversed(details["loc"]) if isinstance(part, str))
            lines.append(f"{key}: {explain(details, key, allowed)}")
        raise ConfigError("\n".join(lines)) from error
