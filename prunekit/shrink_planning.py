"""What a run that takes units out will do, decided before weights are read."""

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunekit.architectures import find
from prunekit.budget import Terms, choose_within
from prunekit.checkpoint import Checkpoint, open_checkpoint
from prunekit.checkpoint import find as find_checkpoint
from prunekit.choosing import choose
from prunekit.config import ShrinkConfig
from prunekit.errors import CapacityError, ConfigError, ShapeError
from prunekit.evaluation import device_of, load_tokenizer, measuring_dtype, stored_dtype
from prunekit.kinds import WHOLE, Kind
from prunekit.layout import runners
from prunekit.loading import empty_model, longest, stored_names, unread
from prunekit.places import places
from prunekit.planning import capped, check_disk, check_judged, check_writes
from prunekit.ranks import ALONE, Ranks
from prunekit.removal import RECORD, refuse_unequal
from prunekit.room import free
from prunekit.shrink_section import Shrink
from prunekit.sites import Place, Site, matrix
from prunekit.stack import StackRunner
from prunekit.stock import sayable, stock_entries
from prunekit.units import count, percent, size
from prunekit.walk import BATCH_TOKENS


@dataclass(frozen=True)
class ShrinkPlan:
    """What a run will take out; made by :func:`plan`.

    Attributes:
        config: What the user wrote.
        checkpoint: The model's files.
        model: The model without weights.
        tokenizer: The tokenizer beside the checkpoint.
        stacks: Runners of its stacks.
        places: Where its units are, of each kind that goes.
        device: Where the model runs.
        dtype: The type in which it runs.
        stored: Name of each parameter → its name in the checkpoint.
        lengths: Tokens of a calibration sample and of an evaluation window, after the cap.
        notes: What the user should know.
        ranks: The processes that share the run.
    """

    config: ShrinkConfig
    checkpoint: Checkpoint
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stacks: list[StackRunner]
    places: dict[Kind, Sequence[Place]]
    device: torch.device
    dtype: torch.dtype
    stored: dict[str, str]
    lengths: tuple[int, int]
    notes: tuple[str, ...]
    ranks: Ranks = ALONE

    @property
    def parameters(self) -> int:
        """Parameters of the model; tied ones count once."""
        return sum(
            math.prod(self.checkpoint.entries[name].shape) for name in set(self.stored.values())
        )

    @property
    def prunable(self) -> int:
        """Parameters that hold something of a unit of the kinds that go."""
        return held(place for found in self.places.values() for place in found)

    @cached_property
    def memory(self) -> dict[str, int]:
        """Peak bytes by what they are for: the whole model is in memory while it is ranked."""
        asks = self.config.train is not None or self.config.prune.truth
        asks |= any(part.needs_loss for part in self.config.prune.method.parts)
        model = self.parameters * self.dtype.itemsize
        widths = [self.stacks[0].features] + [
            matrix(place.reader.linear).shape[1]
            for found in self.places.values()
            for place in found
            if isinstance(place, Site)
        ]
        config = self.config.calibration
        tokens = min(BATCH_TOKENS["cpu"], config.samples * self.lengths[0]) if config else 0
        words = getattr(self.model.config, "vocab_size", 0)
        # For the gradient every block's activations are held, and the logits thrice.
        kept = len(self.stacks[0].blocks) * 12 if asks else 8
        activations = 4 * tokens * (kept * max(widths) + 3 * asks * words)
        parts = {
            "model": model,
            # Of a ranker that asks for the loss also of what linears give.
            "statistics": 4 * sum(width**2 for width in widths)
            + 8 * asks * len(widths) * widths[0] ** 2
            + 3 * 8 * max(widths) ** 2,
            "activations": activations,
        }
        if self.config.train:  # in float32: weights, gradients, two moments, the best so far
            parts["training"] = 5 * 4 * self.parameters - model
        return parts

    def describe(self) -> RenderableType:
        """Return the plan as a table to print."""
        return _describe(self)


def plan(config: ShrinkConfig, ranks: Ranks = ALONE) -> ShrinkPlan:
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
    made = ShrinkPlan(
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


def _check_loss(config: ShrinkConfig, model: PreTrainedModel) -> None:
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
            "prunekit.recovery.recover."
        )


def _check_bias(made: ShrinkPlan) -> None:
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


def held(found: Iterable[Place]) -> int:
    """Return how many parameters hold something of the units of these places."""
    shares = [share for place in found for share in place.shares]
    return sum({id(share.parameter): share.parameter.numel() for share in shares}.values())


def _check_shape(made: ShrinkPlan, found: Sequence[Place]) -> None:
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


def _check_recorded(made: ShrinkPlan, kept: Container[str]) -> None:
    others = [name for name in getattr(made.model.config, RECORD, {}) if name not in kept]
    if others and made.config.prune.uniform:
        raise ConfigError(
            f"prune.uniform: {made.config.model.path} was left with unequal layers by an earlier "
            f"run ({len(others)} of them stay so), which no stock config.json can say."
        )


def terms(made: ShrinkPlan, model: PreTrainedModel, parameters: float) -> Terms:
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
        allowed=sayable(model, [place for place in every if prune.uniform or place.kind in WHOLE]),
    )


def _check_budget(made: ShrinkPlan) -> None:
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


def _check_unread(made: ShrinkPlan) -> None:
    """Refuse tensors that no module reads and that would keep coordinates that go."""
    widths = {place.units for place in made.places.get("hidden", ())}
    for name, entry in unread(made.checkpoint, made.stored, widths):
        if entry.dtype.is_floating_point:
            raise ShapeError(
                f"{entry.file}: {type(made.model).__name__} does not read {name}, which has shape "
                f"{list(entry.shape)} and would stay that wide. Remove it from the checkpoint "
                "first: open the model with transformers and save it again."
            )


def _check_capacity(made: ShrinkPlan) -> None:
    available, needed = free(made.device), sum(made.memory.values())
    if needed > available:
        raise CapacityError(
            f"memory: {' and '.join(made.places)} are ranked with the whole model in memory, about "
            f"{size(needed)} on {made.device}; {size(available)} are free. Take a smaller model, "
            "or a ranker that gathers less."
        )
    check_disk(made.config.output.path, made.checkpoint.nbytes)


def _remarks(made: ShrinkPlan) -> list[str]:
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


def _describe(made: ShrinkPlan) -> RenderableType:
    config, prune = made.config, made.config.prune
    facts = Table.grid(padding=(0, 2))
    asked = (
        f"{percent(prune.sparsity)} of {' and '.join(prune.pattern)}"
        if prune.sparsity is not None
        else f"{' and '.join(prune.pattern)}, {percent(prune.parameters)} of the parameters stay"
    )
    ranked = f"by {prune.method.name}, compared {'in each layer' * (prune.scope == 'layer')}"
    if prune.scope == "global":
        ranked += "across layers"
    rows = {
        "model": f"{config.model.path}  ({type(made.model).__name__}, "
        f"{count(made.parameters)} parameters, {sum(len(s.blocks) for s in made.stacks)} blocks)",
        "prune": f"{asked}, {ranked}, steps "
        f"{prune.steps}, compensate {prune.compensate}, uniform {str(prune.uniform).lower()}, "
        f"rounded up to {prune.round_to}",
        "runs": f"on {made.device} in {str(made.dtype).removeprefix('torch.')}",
        "output": f"{config.output.path}  (at most {size(made.checkpoint.nbytes)})",
        "memory": "about "
        + ", ".join(f"{name} {size(value)}" for name, value in made.memory.items()),
    }
    if made.ranks.several:
        rows["ranks"] = f"{made.ranks.size}: samples are shared; each has the whole model"
    if config.calibration:
        rows["calibration"] = (
            f"{config.calibration.samples} samples of {made.lengths[0]} tokens, seed "
            f"{config.calibration.seed}"
        )
    if prune.truth:
        units = sum(place.units for found in made.places.values() for place in found)
        rows["truth"] = f"{units} runs more of the model, one for each unit"
    if config.train:
        rows["train"] = (
            f"{config.train.steps} steps of {config.train.batch} samples at most, held out "
            f"{config.train.held_out} samples"
        )
    for key, value in rows.items():
        facts.add_row(f"[bold]{key}", value)
    table = Table("units", "layers", "in a layer", "parameters of one", "of the model")
    for kind, found in made.places.items():
        table.add_row(
            kind,
            str(len(found)),
            ", ".join(map(str, sorted({place.units for place in found}))),
            ", ".join(map(count, sorted({place.parameters for place in found}))),
            percent(held(found) / made.parameters),
        )
    return Group(facts, "", table, *[f"[yellow]note[/] {note}" for note in made.notes])
