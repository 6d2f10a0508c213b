"""Plans sparsify runs: all decisions and checks before weights are read.

Everything that can fail because of the config, the model or the machine fails here.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce

import torch

from prunekit.config.run_config import Config
from prunekit.data.row_samples import RowSamples
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import CapacityError, ConfigError
from prunekit.formatting import size
from prunekit.models.devices import compute_dtype, stored_dtype
from prunekit.models.empty_model import max_tokens
from prunekit.models.memory import local_processes
from prunekit.models.vocabulary import token_limit
from prunekit.models.weight_names import stored_names
from prunekit.runs.checks import (
    cap_lengths,
    check_disk,
    generation_memory,
    text_tokenizer,
)
from prunekit.runs.image_data import image_samples, tower_tokens
from prunekit.runs.preflight import (
    Preflight,
    available_memory,
    planned_device,
    requested_placement,
)
from prunekit.runs.sound_data import encoded_tokens, random_feature_notes, sound_samples
from prunekit.runs.sparsify.plan import Plan
from prunekit.runs.sparsify.quantization import planned_quantization, quantization_notes
from prunekit.runs.sparsify.source import Source, layer_notes, open_source, written_dtypes
from prunekit.sparsify.memory_estimate import Memory, estimate_memory, recorded_bytes
from prunekit.sparsify.permute_channels import check_permutable
from prunekit.sparsify.permute_residual import Axes, check_moves, residual_axes
from prunekit.sparsify.recipe import Recipe
from prunekit.sparsify.work_estimate import CostInputs, estimate_traffic, estimate_work


def plan(config: Config, ranks: Ranks = SINGLE, preflight: Preflight | None = None) -> Plan:
    """Plan a run from ``config.json`` and safetensors headers alone.

    Args:
        config: The user's config.
        ranks: Processes that will share the run, from :func:`prunekit.join`.
        preflight: Memory of another machine, for a plan that is only shown.

    Raises:
        PrunekitError: The run cannot work; nothing was written and no weight read.
    """
    source = open_source(config, preflight)
    blocks = source.blocks
    lengths, notes = cap_lengths(config, max_tokens(source.model))
    images = _images(config, source, lengths[0], ranks)
    lengths = (images.longest, lengths[1]) if images else lengths
    recipe = Recipe.of(config.prune, calibrated=config.calibration is not None)
    recipe = replace(recipe, quantize=planned_quantization(config, source))
    recipe.check(blocks)
    device = planned_device(config, ranks, preflight)
    stored, widest = written_dtypes(config, source)
    dtype = _common_dtype(compute_dtype(widest, device), ranks)
    samples = _samples_per_rank(config, ranks, images), _tokens(source, images, lengths[0])
    packs = config.output.format != "dense"
    inputs = CostInputs(device, dtype, stored, samples, ranks, packs=packs)
    made = Plan(
        config=config,
        checkpoint=source.checkpoint,
        model=source.model,
        architecture=source.architecture,
        # Nothing is tokenized for a plan that is only shown.
        tokenizer=text_tokenizer(config, None if source.config_only else source.checkpoint),
        stacks=source.stacks,
        blocks=blocks,
        recipe=recipe,
        device=device,
        dtype=dtype,
        stored=stored,
        axes=residual_stream_axes(source, recipe),
        lengths=lengths,
        memory=_memory(config, source, recipe, inputs, preflight, images),
        work=estimate_work(blocks, recipe, inputs),
        traffic=estimate_traffic(blocks, recipe, inputs),
        notes=(*notes, *_notes(config, source, recipe, images)),
        ranks=ranks,
        preflight=preflight,
        images=images,
    )
    _check_capacity(made)
    return made


def _tokens(source: Source, images: RowSamples | None, length: int) -> int:
    """Return the tokens of a sample, towers and sound encoders included."""
    patches = tower_tokens(source.model, source.stacks, images) if images else 0
    return max(length, patches, encoded_tokens(source.stacks))


def _images(config: Config, source: Source, length: int, ranks: Ranks) -> RowSamples | None:
    """Return calibration samples of images or sound; None for text."""
    if source.config_only:
        return None
    limit = token_limit(source.model, [runner.module for runner in source.stacks])
    return image_samples(config, source.checkpoint, limit, length, ranks) or sound_samples(
        config, source.checkpoint, source.stacks, limit, length
    )


def _memory(
    config: Config,
    source: Source,
    recipe: Recipe,
    inputs: CostInputs,
    preflight: Preflight | None,
    images: RowSamples | None,
) -> Memory:
    """Return the peak memory of the busiest rank, with hidden states placed."""
    dtype = compute_dtype(stored_dtype(source.checkpoint), inputs.device)
    length = inputs.samples[1]
    needs = replace(
        estimate_memory(source.model, source.stacks, source.blocks, recipe, inputs),
        writer=generation_memory(config, source.model, source.stacks, length, dtype),
        images=images.nbytes + recorded_bytes(source.stacks, images.lengths) if images else 0,
    )
    available = available_memory(inputs.device, preflight)
    return needs.placed(requested_placement(config), *available)


def residual_stream_axes(source: Source, recipe: Recipe) -> Axes:
    """Return the axes of a permuted residual stream; empty for another recipe."""
    if recipe.permute:
        check_permutable(source.model, source.stacks)
    if recipe.permute != "residual":
        return {}
    axes = residual_axes(source.model)
    check_moves(source.model, source.checkpoint, stored_names(source.model, source.checkpoint))
    return axes


def _common_dtype(dtype: torch.dtype, ranks: Ranks) -> torch.dtype:
    """Return the widest dtype of all ranks, whose CPUs may differ."""
    return reduce(torch.promote_types, ranks.all_gather_object(dtype))


def _samples_per_rank(config: Config, ranks: Ranks, images: RowSamples | None) -> int:
    """Return the number of calibration samples of the busiest rank."""
    samples = config.calibration.samples if config.calibration else 1
    samples = len(images) if images else samples
    if config.calibration and samples < ranks.size:
        raise ConfigError(
            f"calibration.samples: {samples} cannot be shared by {ranks.size} processes. Start "
            "fewer, or use more samples."
        )
    return -(-samples // ranks.size)


def _notes(
    config: Config, source: Source, recipe: Recipe, images: RowSamples | None
) -> Iterator[str]:
    """Yield notes about permuted weights, adapters, linears and files."""
    yield from _order_notes(recipe)
    yield from quantization_notes(recipe, source)
    yield from layer_notes(source)
    yield from source.checkpoint.check_copyable()
    yield from random_feature_notes(config, source.stacks, images)


def _order_notes(recipe: Recipe) -> Iterator[str]:
    """Yield notes for users of the checkpoint: permuted weights, an adapter."""
    if recipe.permute:
        stream = ", and the coordinates of the residual stream" * (recipe.permute == "residual")
        yield (
            f"Neurons, and channels within heads{stream}, are put in another order: weights do not "
            "lie where those of the dense model do."
        )
    if recipe.recover == "lowrank":
        yield (
            "The checkpoint is to be used with the LoRA adapter beside it, by peft: its blocks "
            "were pruned on what those before give with it. Perplexity after is measured with it."
        )


def _check_capacity(made: Plan) -> None:
    """Refuse a run that needs more memory or disk than is free."""
    available, host = available_memory(made.device, made.preflight)
    if made.memory.separate_host and made.memory.host > host:
        raise CapacityError(
            f"memory: the run needs about {size(made.memory.host)} of main memory, {size(host)} "
            "are free"
            + (
                '. Set calibration.hidden = "disk".'
                if made.memory.where == "host"
                else " for each process. Start fewer."
            )
        )
    if made.memory.total > available:
        raise CapacityError(
            f"memory: the run needs about {size(made.memory.total)} on {made.device}, "
            f"{size(available)} are free. Lower calibration.samples or calibration.length"
            + (", or set measure_error = false." if made.recipe.measure_error else ".")
        )
    if made.preflight and made.preflight.device_memory:
        return  # the disk of the other machine is unknown
    states = made.memory.disk * local_processes()
    check_disk(
        made.config.output.path, made.checkpoint.nbytes + states, made.joining, made.least_joining
    )
