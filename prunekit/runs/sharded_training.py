"""Decisions by which a training fits: sharded weights, or adapters alone."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import TypeVar

from prunekit.architectures.expert_layout import is_fused
from prunekit.config.run_config import Config
from prunekit.config.train_table import Adapter
from prunekit.errors import ConfigError
from prunekit.formatting import size
from prunekit.runs.plan_base import PlanBase
from prunekit.runs.training import trained_adapter, trained_apart

P = TypeVar("P", bound=PlanBase)


def fitted_training(made: P, needed: Callable[[P], int], available: int) -> P:
    """Return a plan whose training is sharded or of adapters, where needed.

    Adapters are trained where all weights do not fit, not even sharded, and the config leaves open
    what is trained; a note says so.

    Args:
        made: The plan, whose training is not sharded.
        needed: Returns the peak bytes that each process needs on its device.
        available: Bytes that each has.

    Raises:
        ConfigError: The config asks for shards, and that cannot be done.
    """
    whole = with_sharding(made, needed, available)
    train = made.config.train
    open_ = train and not (train.adapter or train.only) and find_spec("peft")
    if not train or not open_ or needed(whole) <= available:
        return whole
    adapter = Adapter()
    update = {"train": train.model_copy(update={"adapter": adapter})}
    smaller = replace(made, config=made.config.model_copy(update=update))
    smaller = with_sharding(smaller, needed, available)
    if needed(smaller) > available:
        return whole
    note = (
        f"train: all weights would need about {size(needed(whole))} on {made.device}, "
        f"{size(available)} are free: adapters of rank {adapter.rank} are trained instead, and "
        "merged. Set train.adapter to choose them, also where --resume finds more memory."
    )
    return replace(smaller, notes=(*smaller.notes, note))


def with_sharding(made: P, needed: Callable[[P], int], available: int) -> P:
    """Return a plan whose training is sharded, if it has to be.

    It is if the config asks for that, or leaves it open and nothing else fits.

    Args:
        made: The plan, whose training is not sharded.
        needed: Returns the peak bytes that each process needs on its device.
        available: Bytes that each has.

    Raises:
        ConfigError: It is asked for and cannot be done.
    """
    training = made.config.training
    if training is None or training.sharded is False:
        return made
    sharded = replace(made, sharded=True)
    reason = why_not_sharded(made)
    if training.sharded:
        if reason:
            raise ConfigError(f"{training.table}.sharded: {reason}.")
        return sharded
    helps = needed(sharded) <= available < needed(made)
    return sharded if reason is None and helps else made


def held_words(made: PlanBase) -> str:
    """Return how much of the model a process trains, in words."""
    if not made.sharded:
        return "the whole model"
    if trained_adapter(made.config, made.model):
        return "the adapters, and a part of the weights under them (FSDP 2)"
    return "a part of the weights, gradients and optimizer state (FSDP 2)"


def ways_out(made: PlanBase) -> list[str]:
    """Return how a training needs less memory, in words; empty without one."""
    if (training := made.config.training) is None:
        return []
    table = training.table
    ways = [f"lower {table}.batch"] if training.batch > 1 else []
    if not training.checkpoint_activations:
        ways.append(f"set {table}.checkpoint_activations = true")
    if trained_apart(made) is None:
        ways.append(f"set {table}.adapter, which trains fewer weights")
    if not made.ranks.is_distributed:
        ways.append("start several processes, which can share the weights")
    return ways


def why_not_sharded(made: PlanBase) -> str | None:
    """Return why the weights of a training cannot be sharded, or None."""
    config, ranks = made.config, made.ranks
    if not ranks.is_distributed:
        return (
            "one process has all weights. Start several, such as with torchrun --nproc-per-node 2 "
            "(prunekit plan --world-size 2), or leave the key out"
        )
    if isinstance(config, Config):
        fused = any(is_fused(each) for each in made.model.modules())
        return (
            "the model has experts in one tensor, and masks of its parts are unknown. Prune it "
            "first, by a run without [train], or leave the key out"
            if fused
            else None
        )
    samples = config.calibration.samples if config.calibration else 0
    if not config.prune.gradual:
        return None
    if samples % ranks.size:
        return (
            f"the {samples} calibration samples have to be divided evenly by {ranks.size} "
            "processes, as these run the model alike while units are ranked. Set "
            f"calibration.samples = {samples // ranks.size * ranks.size or ranks.size}"
        )
    ranker = next((part for part in config.prune.method.components if part.by_weights), None)
    if ranker:
        return (
            f"{ranker.name} ranks by gradients of whole weights, which no process has. Choose a "
            "ranker of activations, such as gradient or salience"
        )
    return None
