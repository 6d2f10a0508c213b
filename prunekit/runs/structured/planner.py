"""Plans structured runs: all decisions and checks before weights are loaded."""

from collections.abc import Container, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from prunekit.architectures import find_architecture
from prunekit.checkpoint.compressed import KEPT_UNITS_KEY
from prunekit.config.run_config import StructuredConfig
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError, ShapeError
from prunekit.models.devices import loss_dtype, stored_dtype
from prunekit.models.empty_model import empty_model, max_tokens
from prunekit.models.layout import stack_runners
from prunekit.models.units.base import UnitGroup
from prunekit.models.units.experts import ExpertGroup
from prunekit.models.units.find import unit_groups
from prunekit.models.units.heads_neurons import LinearUnitGroup
from prunekit.models.units.kinds import WHOLE
from prunekit.models.units.stock_config import expressible_in_config, fixed_blocks, stock_entries
from prunekit.models.units.stored_removal import check_whole
from prunekit.models.weight_names import stored_names, unused_tensors
from prunekit.runs.checks import (
    cap_lengths,
    check_generates_text,
    text_tokenizer,
)
from prunekit.runs.preflight import (
    Preflight,
    available_memory,
    planned_checkpoint,
    planned_device,
)
from prunekit.runs.sharded_training import fitted_training
from prunekit.runs.structured.capacity import check_capacity
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.structured.remarks import remarks_of
from prunekit.runs.texts import check_data
from prunekit.runs.training import (
    adapted_linears,
    check_trainable,
    trained_adapter,
    why_no_loss,
)
from prunekit.structured.parameter_budget import (
    BudgetConstraints,
    counted_parameters,
    select_within_budget,
)
from prunekit.structured.selection import (
    check_some_pruned,
    fewest_units,
    select_units,
    unit_count,
)


def plan(
    config: StructuredConfig, ranks: Ranks = SINGLE, preflight: Preflight | None = None
) -> StructuredPlan:
    """Plan a run from ``config.json`` and safetensors headers alone.

    Args:
        config: The user's config.
        ranks: Processes that share calibration and evaluation text.
        preflight: Memory of another machine, for a plan that is only shown.

    Raises:
        PrunekitError: The run cannot work; nothing was written and no weight read.
    """
    checkpoint, config_only = planned_checkpoint(config, preflight)
    model = empty_model(checkpoint)
    stacks = stack_runners(model, find_architecture(model))
    check_data(config, model, stacks)
    check_generates_text(config, model, stacks)
    _check_loss(config, model)
    check_trainable(config, model)
    device = planned_device(config, ranks, preflight)
    dtype = None if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    lengths, notes = cap_lengths(config, max_tokens(model))
    made = StructuredPlan(
        config=config,
        checkpoint=checkpoint,
        model=model,
        # Nothing is tokenized for a plan that is only shown.
        tokenizer=text_tokenizer(config, None if config_only else checkpoint),
        stacks=stacks,
        groups={kind: unit_groups(model, kind) for kind in config.prune.pattern},
        device=device,
        dtype=loss_dtype(dtype or stored_dtype(checkpoint), device),
        stored=stored_names(model, checkpoint),
        lengths=lengths,
        notes=tuple(notes),
        ranks=ranks,
        preflight=preflight,
    )
    made = replace(made, fixed=fixed_blocks(model, made.groups.get("blocks", ())))
    made = fitted_training(
        made, lambda each: each.place.device, available_memory(device, preflight)[0]
    )
    made = replace(made, notes=(*made.notes, *remarks_of(made), *checkpoint.check_copyable()))
    _check(made)
    check_capacity(made)
    return made


def _check(made: StructuredPlan) -> None:
    """Refuse a run that cannot work, whatever the machine."""
    for groups in made.groups.values():
        _check_counts(made, groups)
    check_whole(made.groups.get("hidden", ()), made.model, made.checkpoint)
    _check_left_out(made)
    _check_gradual(made)
    _check_bias(made)
    _check_budget(made)
    _check_unused(made)


def _check_loss(config: StructuredConfig, model: PreTrainedModel) -> None:
    """Refuse to measure a loss where the text holds no labels.

    Raises:
        ConfigError: The ranker or prune.truth needs a loss, and the model has no language
            modeling head.
    """
    undefined = why_no_loss(config, model)
    if undefined is None:
        return
    for part in config.prune.method.components:
        if part.needs_loss:
            raise ConfigError(
                f"prune.method: {part.name} {undefined}. Choose a ranker that only looks at what "
                "units give, such as obs or output-norm, or set calibration.task and name labelled "
                "data."
            )
    if config.prune.truth:
        raise ConfigError(f"prune.truth: it {undefined}. Leave the key out.")


def _check_left_out(made: StructuredPlan) -> None:
    """Refuse to leave out single experts where a router chooses groups."""
    prune = made.config.prune
    if not prune.truth and not any(each.compares_losses for each in prune.method.components):
        return
    for group in made.groups.get("experts", ()):
        if isinstance(group, ExpertGroup):
            group.router.check_open(group.name, torch.arange(group.units) > 0)


def _check_gradual(made: StructuredPlan) -> None:
    """Refuse units that always have to be kept, while training."""
    fixed = [f"{name}.{unit}" for name, units in made.fixed.items() for unit in units]
    if made.config.prune.gradual and fixed:
        raise ConfigError(
            f"prune.end: {', '.join(fixed)} cannot be left out, as no stock config says so, and "
            "blocks are chosen by score alone while training. Leave end out: they are removed "
            "once, then the model is trained."
        )
    if adapter := trained_adapter(made.config, made.model):
        adapted_linears(made.model, adapter)


def _check_bias(made: StructuredPlan) -> None:
    """Refuse compensation by biases that the model does not have."""
    if made.config.prune.compensate != "bias":
        return
    for group in (group for groups in made.groups.values() for group in groups):
        if isinstance(group, LinearUnitGroup) and group.reader.linear.bias is None:
            raise ConfigError(
                f'prune.compensate: "bias" needs one in {group.name}, and '
                f"{type(made.model).__name__} with this config.json has none there that its files "
                'could hold. Choose "refit".'
            )


def _check_counts(made: StructuredPlan, groups: Sequence[UnitGroup]) -> None:
    """Refuse numbers of units that cannot be removed or recorded in ``config.json``."""
    prune, kind = made.config.prune, groups[0].kind
    multiples = {group.name: group.unit_multiple(prune.round_to) for group in groups}
    if all(multiples[group.name] >= group.units for group in groups) and prune.round_to > 1:
        raise ConfigError(
            f"prune.round_to: {kind} stay in multiples of {min(multiples.values())}, by "
            f"what is asked for and what transformers can divide, and no layer has more than "
            f"{max(group.units for group in groups)}, so that none could go."
        )
    if prune.sparsity is None:
        return
    removed = select_units(
        {group.name: torch.zeros(group.units) for group in groups},
        {group.name: torch.ones(group.units, dtype=torch.bool) for group in groups},
        prune.sparsity,
        scope=prune.scope,
        least=fewest_units(groups, prune.least),
        multiples=multiples,
    )
    fixed = sum(len(made.fixed.get(group.name, ())) for group in groups)
    if kind == "blocks" and len(removed) > sum(group.units for group in groups) - fixed:
        raise ShapeError(
            f"prune.sparsity: of the blocks, {fixed} cannot go, as no stock config can leave them "
            f"out, and {len(removed)} are asked for. Ask for fewer."
        )
    units = sum(group.units for group in groups)
    if prune.scope == "layer" or len(groups) == 1 or not unit_count(prune.sparsity, units):
        check_some_pruned("prune.sparsity", prune.sparsity, units, kind, len(removed))
    if not prune.uniform and kind not in WHOLE:
        for group in groups:
            group.check_unequal()
        return
    left = {group.name: group.units for group in groups}
    for unit in removed:
        left[groups[unit.layer].name] -= 1
    kept = {name: range(units) for name, units in left.items()}
    _check_recorded(made, kept)
    stock_entries(made.model, groups, kept)


def _check_recorded(made: StructuredPlan, kept: Container[str]) -> None:
    """Refuse a uniform run on a model with unequal layers."""
    recorded = getattr(made.model.config, KEPT_UNITS_KEY, {})
    unequal = [name for name in recorded if name not in kept]
    if unequal and made.config.prune.uniform:
        raise ConfigError(
            f"prune.uniform: {made.config.model.path} was left with unequal layers by an earlier "
            f"run ({len(unequal)} of them stay so), which no stock config.json can say."
        )


def budget_constraints(
    made: StructuredPlan, model: PreTrainedModel, fraction: float
) -> BudgetConstraints:
    """Return the constraints of keeping a fraction of the parameters.

    Args:
        made: The plan.
        model: The model whose units are removed, with or without weights.
        fraction: Fraction of all parameters that may be kept.
    """
    prune = made.config.prune
    groups = [group for kind in made.groups for group in unit_groups(model, kind)]
    return BudgetConstraints(
        parameters=int(fraction * made.counted_parameters),
        scope=prune.scope,
        least=prune.least,
        multiples={group.name: group.unit_multiple(prune.round_to) for group in groups},
        allowed=expressible_in_config(
            model, [group for group in groups if prune.uniform or group.kind in WHOLE]
        ),
        counted=counted_parameters(model, prune.parameters_of),
    )


def _check_budget(made: StructuredPlan) -> None:
    """Refuse a parameter budget that cannot be met."""
    prune = made.config.prune
    if prune.parameters is None:
        return
    every = [group for groups in made.groups.values() for group in groups]
    if not prune.uniform:
        for group in every:
            group.check_unequal()
    _check_recorded(made, [group.name for group in every])
    keep = {group.name: torch.ones(group.units, dtype=torch.bool) for group in every}
    equal = {group.name: torch.ones(group.units, dtype=torch.float64) for group in every}
    constraints = budget_constraints(made, made.model, prune.parameters)
    select_within_budget(every, equal, keep, made.counted_parameters, constraints)


def _check_unused(made: StructuredPlan) -> None:
    """Refuse unused tensors with a size that the smaller model lacks.

    Blocks for multi-token prediction are such tensors: the config gives them the sizes of all other
    blocks. Where only whole blocks are removed, they keep their sizes and follow the kept blocks.
    """
    widths = {group.units for group in made.groups.get("hidden", ())}
    shapes = {
        tuple(axis.parameter.shape)
        for groups in made.groups.values()
        for group in groups
        if isinstance(group, LinearUnitGroup | ExpertGroup)
        for axis in group.parameter_axes
    }
    sizes = widths.union(*shapes)
    for name, entry in unused_tensors(made.checkpoint, made.stored, sizes):
        is_narrowed = entry.shape in shapes or widths & {*entry.shape}
        if entry.dtype.is_floating_point and is_narrowed:
            raise ShapeError(
                f"{entry.file}: {type(made.model).__name__} does not read {name}, which has shape "
                f"{list(entry.shape)} and would stay that wide. Remove it from the checkpoint "
                "first: open the model with transformers and save it again."
            )
