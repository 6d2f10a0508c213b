"""Every decision taken before weights are read; whatever can fail, fails here."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from functools import reduce
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from prunekit.allocations.uniform import Uniform
from prunekit.architectures import Architecture, find
from prunekit.checkpoint.hub import find as find_checkpoint
from prunekit.checkpoint.reader import Checkpoint, open_checkpoint
from prunekit.config.prune_table import Prune
from prunekit.config.run_config import Config
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import CapacityError, ConfigError
from prunekit.formatting import size
from prunekit.models.devices import compute_dtype, device_of, stored_dtype
from prunekit.models.empty_model import empty_model, has_weights, longest, outline
from prunekit.models.layout import Block, Linear, Selection, layout, runners
from prunekit.models.memory import neighbours
from prunekit.models.vocabulary import load_tokenizer
from prunekit.models.weight_names import stored_names
from prunekit.patterns.base import Grouped
from prunekit.runs.checks import capped, check_disk, check_judged, check_writes, writer_memory
from prunekit.runs.sparsify.plan import Plan, Preflight, _asked, _available
from prunekit.sparsify.memory_estimate import memory
from prunekit.sparsify.permute_channels import check_permutable
from prunekit.sparsify.permute_residual import check_moves, residual_axes
from prunekit.sparsify.recipe import Recipe
from prunekit.sparsify.work_estimate import CostInputs, traffic, work


def plan(config: Config, ranks: Ranks = SINGLE, preflight: Preflight | None = None) -> Plan:
    """Decide everything that can be decided from ``config.json`` and safetensors headers.

    Args:
        config: What the user wrote.
        ranks: The processes that will share the run, from :func:`prunekit.join`.
        preflight: For a plan that is only to be looked at.

    Raises:
        PrunekitError: Something cannot work; nothing was written and no weight read.
    """
    folder = find_checkpoint(config.model.path, config.model.revision)
    outlined = preflight is not None and not has_weights(folder)
    checkpoint = outline(folder) if outlined else open_checkpoint(folder)
    model = empty_model(checkpoint)
    architecture = find(model)
    stacks = runners(model, architecture)
    check_judged(config, model, stacks)
    check_writes(config, model, stacks)
    prune = config.prune
    blocks = layout(stacks, Selection(prune.pattern, prune.skip, prune.on_indivisible))
    _check_skips(config, model, blocks)
    elsewhere = preflight is not None and preflight.device_memory is not None
    device = torch.device("cuda") if elsewhere else device_of(config.model.device)
    device = device if preflight else ranks.place(device)
    asked = None if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    lengths, notes = capped(config, longest(model))
    recipe = Recipe.of(prune, calibrated=config.calibration is not None)
    recipe.check(blocks)
    if recipe.permute:
        check_permutable(model, stacks)
    names, axes = stored_names(model, checkpoint), {}
    if recipe.permute == "residual":
        axes = residual_axes(model)
        check_moves(model, checkpoint, names)
    stored = _stored(names, checkpoint, blocks, asked)
    dtype = compute_dtype(_widest(asked or stored_dtype(checkpoint), blocks, stored), device)
    # CPUs of ranks may differ; in the wider type all can run.
    dtype = reduce(torch.promote_types, ranks.all_gather_object(dtype))
    share = _share(config, ranks), lengths[0]
    given = CostInputs(device, dtype, stored, share, ranks)
    needs = replace(
        memory(model, stacks, blocks, recipe, given),
        writer=writer_memory(
            config, model, stacks, lengths[0], compute_dtype(stored_dtype(checkpoint), device)
        ),
    ).placed(_asked(config), *_available(device, preflight))
    made = Plan(
        config=config,
        checkpoint=checkpoint,
        model=model,
        architecture=architecture,
        # Nothing is tokenised for a plan that is only looked at.
        tokenizer=cast("Any", None) if outlined else load_tokenizer(checkpoint),
        stacks=stacks,
        blocks=blocks,
        recipe=recipe,
        device=device,
        dtype=dtype,
        stored=stored,
        axes=axes,
        lengths=lengths,
        memory=needs,
        work=work(blocks, recipe, given),
        traffic=traffic(blocks, recipe, given),
        notes=(*notes, *_promises(recipe), *_remarks(architecture, model, blocks)),
        ranks=ranks,
        preflight=preflight,
    )
    _check_format(made)
    _check_capacity(made)
    return made


def _check_format(made: Plan) -> None:
    expert = next((linear.name for linear in made.linears if linear.expert), None)
    if expert and made.config.output.format != "dense":
        raise ConfigError(
            f'output.format: transformers cannot open {expert} and other experts unless "dense".'
        )


def _share(config: Config, ranks: Ranks) -> int:
    """Return how many calibration samples the busiest rank has."""
    samples = config.calibration.samples if config.calibration else 1
    if config.calibration and samples < ranks.size:
        raise ConfigError(
            f"calibration.samples: {samples} cannot be shared by {ranks.size} processes. Start "
            "fewer, or use more samples."
        )
    return -(-samples // ranks.size)


def _promises(recipe: Recipe) -> Iterator[str]:
    """Say what users of the checkpoint should know."""
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


def _remarks(architecture: Architecture, model: PreTrainedModel, blocks: list[Block]) -> list[str]:
    notes = [
        f"{linear.name} stays dense: {linear.skipped}."
        for block in blocks
        for linear in block.linears
        if linear.skipped
    ]
    if architecture.probed:
        notes.insert(
            0,
            f"Model type {model.config.model_type!r} is not declared; its blocks and stages were "
            "found by probing: look at the list of layers.",
        )
    return notes


def _stored(
    names: Mapping[str, str],
    checkpoint: Checkpoint,
    blocks: list[Block],
    asked: torch.dtype | None,
) -> dict[str, torch.dtype]:
    return {
        linear.name: asked or checkpoint.entries[names[f"{linear.name}.weight"]].dtype
        for block in blocks
        for linear in block.linears
    }


def _widest(dtype: torch.dtype, blocks: list[Block], stored: dict[str, torch.dtype]) -> torch.dtype:
    """Return the type that holds ``dtype`` and each weight that is pruned, so none is rounded."""
    pruned = (stored[linear.name] for block in blocks for linear in block.pruned)
    return reduce(torch.promote_types, pruned, dtype)


def _check_skips(config: Config, model: PreTrainedModel, blocks: list[Block]) -> None:
    linears = [linear for block in blocks for linear in block.linears]
    if all(linear.skipped for linear in linears):
        raise ConfigError("prune: every linear of the model is skipped; nothing would be pruned.")
    _check_takes(config.prune, [linear for linear in linears if not linear.skipped])
    names = [name for name, _ in model.named_modules()]
    names += [linear.path for linear in linears]
    for skip in config.prune.skip:
        if not any(fnmatch(name, skip) for name in names):
            raise ConfigError(
                f'prune.skip: "{skip}" matches no module. Names look like {linears[0].name}; '
                "* stands for any characters."
            )


def _check_takes(prune: Prune, pruned: list[Linear]) -> None:
    """Refuse a sparsity that rounds to nothing in every layer."""
    pattern, sparsity = prune.pattern, prune.sparsity
    if not (sparsity and isinstance(prune.allocation, Uniform) and isinstance(pattern, Grouped)):
        return
    if not any(any(pattern.groups(one.outputs, one.inputs, sparsity).pruned) for one in pruned):
        raise ConfigError(
            f'prune.sparsity: {sparsity:g} takes nothing of any layer by pattern "{pattern.name}", '
            f"for one of {pruned[0].name}, {pruned[0].outputs} × {pruned[0].inputs}. Raise it, or "
            "choose another pattern."
        )


def _check_capacity(made: Plan) -> None:
    available, host = _available(made.device, made.preflight)
    if made.memory.apart and made.memory.host > host:
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
        return  # its disk is not here
    check_disk(made.config.output.path, made.checkpoint.nbytes + made.memory.disk * neighbours())
