"""Planning of runs that prune weights and train the model."""

from dataclasses import replace

import torch

from prunekit.config.run_config import Config
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import CapacityError
from prunekit.formatting import size
from prunekit.models.empty_model import max_tokens
from prunekit.models.weight_names import check_whole_tensors
from prunekit.runs.checks import cap_lengths, check_disk, text_tokenizer
from prunekit.runs.preflight import Preflight, planned_device
from prunekit.runs.sharded_training import fitted_training, held_words, ways_out
from prunekit.runs.sparsify.planner import residual_stream_axes
from prunekit.runs.sparsify.source import Source, layer_notes, open_source, written_dtypes
from prunekit.runs.trained.plan import TrainedPlan, gradual_settings
from prunekit.runs.training import check_trainable
from prunekit.runs.training_memory import (
    distillation_memory,
    saved_state_disk,
    training_activations,
    training_state_bytes,
)
from prunekit.sparsify.memory_estimate import estimate_memory
from prunekit.sparsify.recipe import Recipe
from prunekit.sparsify.work_estimate import CostInputs
from prunekit.training.gradual_settings import gradual_section


def plan(config: Config, ranks: Ranks = SINGLE, preflight: Preflight | None = None) -> TrainedPlan:
    """Plan a run from ``config.json`` and safetensors headers alone.

    Args:
        config: The user's config, which has [train].
        ranks: Processes that share the training; each has the whole model.
        preflight: Memory of another machine, for a plan that is only shown.

    Raises:
        PrunekitError: The run cannot work; nothing was written and no weight read.
    """
    source = open_source(config, preflight)
    check_trainable(config, source.model)
    check_whole_tensors(source.model, source.checkpoint)
    lengths, notes = cap_lengths(config, max_tokens(source.model))
    recipe = _recipe(config, source)
    made = TrainedPlan(
        config=config,
        checkpoint=source.checkpoint,
        model=source.model,
        architecture=source.architecture,
        # Nothing is tokenized for a plan that is only shown.
        tokenizer=text_tokenizer(config, None if source.config_only else source.checkpoint),
        stacks=source.stacks,
        blocks=source.blocks,
        recipe=recipe,
        device=planned_device(config, ranks, preflight),
        dtype=torch.float32,
        stored=written_dtypes(config, source)[0],
        lengths=lengths,
        memory={},
        notes=(*notes, *layer_notes(source), *source.checkpoint.check_copyable()),
        ranks=ranks,
        preflight=preflight,
    )
    made = fitted_training(made, lambda each: sum(_memory(each).values()), made.available)
    made = replace(made, memory=_memory(made))
    _check_capacity(made)
    return made


def _recipe(config: Config, source: Source) -> Recipe:
    """Return how blocks are pruned, checked against the model."""
    section = config.prune
    if section.gradual:
        settings = gradual_settings(section)
        method, pattern = settings.pop("method"), settings.pop("pattern")
        section = gradual_section(method, pattern, settings.pop("sparsity", None), settings)
    recipe = Recipe.of(section, calibrated=True)
    recipe.check(source.blocks)
    residual_stream_axes(source, recipe)
    return recipe


def _memory(made: TrainedPlan) -> dict[str, int]:
    """Return the peak bytes of each rank, by use."""
    calibration = made.config.calibration
    assert calibration is not None
    samples = calibration.samples, made.lengths[0]
    costs = CostInputs(made.device, made.dtype, made.stored, samples, made.ranks)
    pruning = estimate_memory(made.model, made.stacks, made.blocks, made.recipe, costs)
    return {
        "training": training_state_bytes(made),
        **distillation_memory(made, gated=False),
        "activations": max(training_activations(made), pruning.activations),
        "masks": made.prunable // 8,
        "statistics": pruning.statistics + pruning.solve,
        "hidden states": pruning.hidden,
    }


def _check_capacity(made: TrainedPlan) -> None:
    """Refuse a run that needs more memory or disk than is free."""
    needed, available = sum(made.memory.values()), made.available
    if needed > available:
        ways = ", ".join(ways_out(made))
        raise CapacityError(
            f"memory: [train] holds {held_words(made)} in memory, about {size(needed)} on "
            f"{made.device}; {size(available)} are free. To need less, {ways}, or take a smaller "
            "model."
        )
    if made.preflight and made.preflight.device_memory:
        return  # the disk of the other machine is unknown
    needed = made.checkpoint.nbytes
    check_disk(
        made.config.output.path, needed, made.joining, made.least_joining, saved_state_disk(made)
    )
