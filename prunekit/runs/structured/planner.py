"""What a run that takes units out will do, decided before weights are read."""

from collections.abc import Container, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from prunekit.architectures import find
from prunekit.checkpoint.hub import find as find_checkpoint
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.config.run_config import StructuredConfig
from prunekit.config.structured_table import Shrink
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import CapacityError, ConfigError, ShapeError
from prunekit.formatting import size
from prunekit.models.devices import device_of, measuring_dtype, stored_dtype
from prunekit.models.empty_model import empty_model, longest
from prunekit.models.layout import runners
from prunekit.models.memory import free
from prunekit.models.units.base import UnitGroup
from prunekit.models.units.find import places
from prunekit.models.units.heads_neurons import Site
from prunekit.models.units.kinds import WHOLE, Kind
from prunekit.models.units.removal import RECORD, refuse_unequal
from prunekit.models.units.stock_config import expressible_in_config, stock_entries
from prunekit.models.vocabulary import load_tokenizer
from prunekit.models.weight_names import stored_names, unread
from prunekit.runs.checks import capped, check_disk, check_judged, check_writes
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.structured.parameter_budget import Terms, choose_within
from prunekit.structured.selection import choose


def plan(config: StructuredConfig, ranks: Ranks = SINGLE) -> StructuredPlan:
    """Decide everything that can be decided from ``config.json`` and safetensors headers.

    ``ranks`` share the calibration and evaluation text; each has the whole model.

    Raises:
        PrunekitError: Something cannot work; nothing was written and no weight read.
    """
    checkpoint = open_checkpoint(find_checkpoint(config.model.path, config.model.revision))
    model = empty_model(checkpoint)
    stacks = runners(model, find(model))
    check_judged(config, model, stacks)
    check_writes(config, model, stacks)
    _check_loss(config, model)
    device = ranks.place(device_of(config.model.device))
    asked = None if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    lengths, notes = capped(config, longest(model))
    made = StructuredPlan(
        config=config,
        checkpoint=checkpoint,
        model=model,
        tokenizer=load_tokenizer(checkpoint),
        stacks=stacks,
        places={kind: places(model, kind) for kind in config.prune.pattern},
        device=device,
        dtype=measuring_dtype(asked or stored_dtype(checkpoint), device),
        stored=stored_names(model, checkpoint),
        lengths=lengths,
        notes=tuple(notes),
        ranks=ranks,
    )
    made = replace(made, notes=(*notes, *_remarks(made)))
    for found in made.places.values():
        _check_shape(made, found)
    _check_bias(made)
    _check_budget(made)
    _check_unread(made)
    _check_capacity(made)
    return made


def _check_loss(config: StructuredConfig, model: PreTrainedModel) -> None:
    ranker, kind = config.prune.method, type(model).__name__
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        return
    unsaid = f"asks how well the model predicts, and for {kind} a text does not say what is right"
    for part in ranker.parts:
        if part.needs_loss:
            raise ConfigError(
                f"prune.method: {part.name} {unsaid}. Choose a ranker that only looks at what "
                "units give, such as obs or output-norm, or rank labelled data in Python: "
                "prunekit.heads(model)."
            )
    if config.prune.truth:
        raise ConfigError(f"prune.truth: it {unsaid}. Leave the key out.")
    if config.train:
        raise ConfigError(
            f"train: it {unsaid}. Leave the table out, and train in Python on labelled data: "
            "prunekit.training.recover.recover."
        )


def _check_bias(made: StructuredPlan) -> None:
    """Refuse to put the mean of what goes into a bias that is not there and no config could say."""
    if made.config.prune.compensate != "bias":
        return
    for site in (place for found in made.places.values() for place in found):
        if isinstance(site, Site) and site.reader.linear.bias is None:
            raise ConfigError(
                f'prune.compensate: "bias" needs one in {site.name}, and '
                f"{type(made.model).__name__} with this config.json has none there that its files "
                'could hold. Choose "refit".'
            )


def _check_shape(made: StructuredPlan, found: Sequence[UnitGroup]) -> None:
    """Refuse a number of units that cannot go, or cannot be said afterwards."""
    prune = made.config.prune
    multiples = {place.name: place.multiple(prune.round_to) for place in found}
    if all(multiples[place.name] >= place.units for place in found) and prune.round_to > 1:
        raise ConfigError(
            f"prune.round_to: {found[0].kind} stay in multiples of {min(multiples.values())}, by "
            f"what is asked for and what transformers can divide, and no layer has more than "
            f"{max(place.units for place in found)}, so that none could go."
        )
    if prune.sparsity is None:
        return None
    keep = {place.name: torch.ones(place.units, dtype=torch.bool) for place in found}
    nothing = {place.name: torch.zeros(place.units) for place in found}
    gone = choose(
        nothing,
        keep,
        prune.sparsity,
        scope=prune.scope,
        least=prune.least,
        multiples=multiples,
    )
    if prune.scope == "layer" or len(found) == 1:
        check_some_go(prune, found[0].kind, sum(place.units for place in found), len(gone))
    if not prune.uniform and found[0].kind not in WHOLE:
        return refuse_unequal([place for place in found if isinstance(place, Site)])
    left = {place.name: place.units for place in found}
    for unit in gone:
        left[found[unit.layer].name] -= 1
    kept = {name: range(units) for name, units in left.items()}
    _check_recorded(made, kept)
    stock_entries(made.model, found, kept)
    return None


def check_some_go(prune: Shrink, kind: Kind, units: int, gone: int) -> None:
    """Refuse a run that would leave everything as it was, since numbers are rounded up.

    Raises:
        ConfigError: None of so many units of a kind go, though some were asked for.
    """
    if not gone and prune.sparsity is not None and int(prune.sparsity * units + 0.5):
        raise ConfigError(
            f"prune.sparsity: of {units} {kind} none would go, as numbers that stay are rounded "
            "up to what round_to and transformers ask for. Ask for more to go."
        )


def _check_recorded(made: StructuredPlan, kept: Container[str]) -> None:
    others = [name for name in getattr(made.model.config, RECORD, {}) if name not in kept]
    if others and made.config.prune.uniform:
        raise ConfigError(
            f"prune.uniform: {made.config.model.path} was left with unequal layers by an earlier "
            f"run ({len(others)} of them stay so), which no stock config.json can say."
        )


def terms(made: StructuredPlan, model: PreTrainedModel, parameters: float) -> Terms:
    """Return what a budget of so large a part of the parameters asks for.

    Args:
        made: The plan.
        model: Whose units go, with or without weights.
        parameters: The part of all parameters that may stay.
    """
    prune = made.config.prune
    every = [place for kind in made.places for place in places(model, kind)]
    return Terms(
        parameters=int(parameters * made.parameters),
        scope=prune.scope,
        least=prune.least,
        multiples={place.name: place.multiple(prune.round_to) for place in every},
        allowed=expressible_in_config(
            model, [place for place in every if prune.uniform or place.kind in WHOLE]
        ),
    )


def _check_budget(made: StructuredPlan) -> None:
    """Refuse a budget that cannot be met."""
    prune = made.config.prune
    if prune.parameters is None:
        return
    every = [place for found in made.places.values() for place in found]
    if not prune.uniform:
        refuse_unequal([place for place in every if isinstance(place, Site)])
    _check_recorded(made, [place.name for place in every])
    keep = {place.name: torch.ones(place.units, dtype=torch.bool) for place in every}
    equal = {place.name: torch.ones(place.units, dtype=torch.float64) for place in every}
    asked = terms(made, made.model, prune.parameters)
    choose_within(every, equal, keep, made.parameters, asked)


def _check_unread(made: StructuredPlan) -> None:
    """Refuse tensors that no module reads and that would keep coordinates that go."""
    widths = {place.units for place in made.places.get("hidden", ())}
    for name, entry in unread(made.checkpoint, made.stored, widths):
        if entry.dtype.is_floating_point:
            raise ShapeError(
                f"{entry.file}: {type(made.model).__name__} does not read {name}, which has shape "
                f"{list(entry.shape)} and would stay that wide. Remove it from the checkpoint "
                "first: open the model with transformers and save it again."
            )


def _check_capacity(made: StructuredPlan) -> None:
    available, needed = free(made.device), sum(made.memory.values())
    if needed > available:
        raise CapacityError(
            f"memory: {' and '.join(made.places)} are ranked with the whole model in memory, about "
            f"{size(needed)} on {made.device}; {size(available)} are free. Take a smaller model, "
            "or a ranker that gathers less."
        )
    check_disk(made.config.output.path, made.checkpoint.nbytes)


def _remarks(made: StructuredPlan) -> list[str]:
    prune = made.config.prune
    remarks = [
        f"Of hidden dimensions a multiple of {place.multiple(prune.round_to)} stays, rounded up: "
        "transformers wants a number that the heads divide."
        for place in made.places.get("hidden", ())
        if place.multiple(1) > 1
    ]
    if not prune.uniform and not WHOLE.issuperset(prune.pattern):
        remarks.append(
            "Layers may keep different numbers of units: the folder opens with prunekit.load, and "
            "with transformers after `import prunekit`. uniform = true makes it one that any tool "
            "opens."
        )
    return remarks
