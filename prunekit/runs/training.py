"""Training within a run: its text, memory, progress and report."""

import importlib.util
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from prunekit.architectures.coverage import LINEAR_TYPES
from prunekit.config.gradual_keys import GradualKeys
from prunekit.config.run_config import Config, StructuredConfig
from prunekit.config.train_table import Adapter, Train, Training
from prunekit.data.row_samples import RowSamples
from prunekit.errors import ConfigError
from prunekit.formatting import number, percent
from prunekit.models.causal import predicts_next_token
from prunekit.models.orientation import features
from prunekit.models.units.base import Kept
from prunekit.runs.plan_base import PlanBase
from prunekit.runs.record import Record
from prunekit.runs.stage import Stage
from prunekit.runs.texts import Data
from prunekit.runs.training_log import Row, TrainingLog
from prunekit.structured.batches import Batch
from prunekit.structured.block_batches import to_device
from prunekit.training.adapter_targets import adapter_targets
from prunekit.training.apt.loop import default_targets
from prunekit.training.chosen_parameters import chosen_parameters
from prunekit.training.lora import add_adapter, merge_adapters
from prunekit.training.masked_adapters import mask_adapters
from prunekit.training.recover import During, TrainingStep, recover, summarize
from prunekit.training.teachers import Teacher
from prunekit.training.trackers import check_trackers, trackers

TRACKERS = "trackers"
"""Subfolder of the output for the files of experiment trackers."""
Texts = tuple[list[Batch], list[Batch]]
"""Batches to train on, and held-out ones."""


def why_no_loss(config: Config | StructuredConfig, model: PreTrainedModel) -> str | None:
    """Return why calibration data has no loss, or None."""
    if predicts_next_token(type(model), model.config):
        return None
    if config.calibration and config.calibration.task:  # it fits the model, and has labels
        return None
    name = type(model).__name__
    return f"asks how well the model predicts, and for {name} a text does not say what is right"


def check_trainable(config: Config | StructuredConfig, model: PreTrainedModel) -> None:
    """Refuse missing trackers, and models without a loss on text.

    Args:
        config: The user's config.
        model: The model, with or without weights.

    Raises:
        ConfigError: The config has [train], and the model is no causal language model, or a
            tracker is not installed.
    """
    reason = why_no_loss(config, model)
    if (training := config.training) is None:
        return
    check_trackers(training.log_with)
    if config.train and config.train.only:
        for kind in config.train.only:
            if not chosen_parameters(model, [kind]):
                raise ConfigError(
                    f"train.only: {type(model).__name__} has no {kind} that could be trained "
                    "alone. Choose others, or leave the key out."
                )
    if reason:
        raise ConfigError(
            f"{training.table}: it {reason}. Set calibration.task and name labelled data, or leave "
            "the table out."
        )


def training_texts(plan: PlanBase, tokens: Data | None) -> Texts | None:
    """Return training and held-out batches; None without a training.

    Args:
        plan: The plan of the run.
        tokens: Calibration data; the last samples are held out.

    Raises:
        ConfigError: There is less text than is held out.
    """
    train = plan.config.training
    if train is None or tokens is None:
        return None
    if len(tokens) <= train.held_out:
        raise ConfigError(
            f"calibration.data: there is text for {len(tokens)} samples, of which "
            f"held_out = {train.held_out} leave none to train on."
        )
    assert not isinstance(tokens, RowSamples)  # the plan refuses to train on them
    parts = tokens.part(slice(-train.held_out)), tokens.part(slice(-train.held_out, None))
    trained, held_out = (
        [to_device(batch, plan.device) for batch in part.batches_of(train.batch)] for part in parts
    )
    return trained, held_out


def training_words(train: Training, adapter: Adapter | None) -> str:
    """Return the training that a config asks for, in words."""
    only = train.only if isinstance(train, Train) else []
    trained = f", {' and '.join(only)} alone" if only else ""
    if adapter:
        trained = f", adapters of rank {adapter.rank} on {', '.join(adapter.targets)}"
    return (
        f"{train.steps} steps of {train.batch} samples at most, held out {train.held_out} samples"
        f"{trained}{', activations checkpointed' * train.checkpoint_activations}"
        f"{saved_words(train)}"
    )


def saved_words(train: Training) -> str:
    """Return when the state of a training is saved, in words."""
    if train.save_every == 0:
        return "; a training that is stopped begins again"
    often = "with validations" if train.save_every is None else f"every {train.save_every} steps"
    return f"; saved {often}, for --resume"


def schedule_words(prune: GradualKeys) -> str:
    """Return when a model is pruned that is trained, in words."""
    schedule = prune.gradual
    if schedule is None:
        return "once, before the training"
    due, regrowth = schedule.due, prune.regrowth_interval
    if len(due) == 1:
        return f"once, at step {due[0]} of the training"
    returning = f"; {prune.regrow:g} of it returns every {regrowth} steps" if regrowth else ""
    return (
        f"{len(due)} times while training, from step {due[0]} to {due[-1]}, "
        f"{schedule.name}{returning}"
    )


def trained_adapter(config: Config | StructuredConfig, model: PreTrainedModel) -> Adapter | None:
    """Return the adapter that is trained, at its largest, or None."""
    if config.apt:
        targets = config.apt.targets or default_targets(model)
        return Adapter(rank=config.apt.most_rank, targets=targets)
    return config.train.adapter if config.train else None


def trained_apart(plan: PlanBase) -> int | None:
    """Return the number of trained parameters, or None if all are trained."""
    if adapter := trained_adapter(plan.config, plan.model):
        linears = adapted_linears(plan.model, adapter)
        return adapter.rank * sum(map(sum, map(features, linears)))
    if (train := plan.config.train) and train.only:
        return sum(each.numel() for each in chosen_parameters(plan.model, train.only))
    return None


def adapted_linears(model: PreTrainedModel, adapter: Adapter) -> list[nn.Module]:
    """Return the linears of a model that an adapter is to have.

    Raises:
        ConfigError: A target names none, or peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("train.adapter: needs the package peft: pip install 'prunekit[lora]'.")
    targets = adapter_targets(model, adapter.targets)
    linears = {name: each for name, each in model.named_modules() if isinstance(each, LINEAR_TYPES)}
    if isinstance(targets, str):
        head = model.get_output_embeddings()
        return [each for each in linears.values() if each is not head]
    return [
        linears[name]
        for name in linears
        if any(f".{name}".endswith(f".{target}") for target in targets)
    ]


@contextmanager
def adapted(plan: PlanBase, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Return the model as [train] trains it: with adapters, or partly frozen.

    At the end of the ``with`` block the adapter is merged; zeros remain zero.
    """
    train = plan.config.train
    assert train is not None
    if train.only:
        model.requires_grad_(requires_grad=False)
        for parameter in chosen_parameters(model, train.only):
            parameter.requires_grad_()
    if train.adapter is None:
        yield model
        return
    made = add_adapter(model, train.adapter.rank, train.adapter.targets, seed=train.seed)
    with mask_adapters(made):
        yield cast("PreTrainedModel", made)
    merge_adapters(made)


def train_model(  # noqa: PLR0913, PLR0917  independent options
    plan: PlanBase,
    model: PreTrainedModel,
    texts: Texts,
    log: TrainingLog,
    during: During | None = None,
    teacher: Teacher | None = None,
    kept: Kept | None = None,
) -> Generator[Record, None, list[Row]]:
    """Train a model, yield progress and return the recorded steps.

    Args:
        plan: The plan of the run.
        model: The model in float32, trained in place.
        texts: Training and held-out batches.
        log: Stores the recorded steps and the state.
        during: See :func:`prunekit.training.recover.recover`.
        teacher: The model before pruning; None without [distill].
        kept: Kept blocks and coordinates, if any were removed from the model.
    """
    settings = plan.training
    assert settings is not None
    steps = recover(
        model,
        *texts,
        settings,
        ranks=plan.ranks,
        during=during,
        distill=plan.config.distill,
        teacher=teacher,
        kept=kept,
        log=log,
    )
    return (yield from recorded_steps(plan, steps, log))


def recorded_steps(
    plan: PlanBase, steps: Iterator[TrainingStep], log: TrainingLog
) -> Generator[Record, None, list[Row]]:
    """Yield and track a training's progress; return the recorded steps.

    Args:
        plan: The plan of the run.
        steps: The steps of the training.
        log: Stores the recorded steps.
    """
    settings = plan.config.training
    assert settings is not None
    yield Record("phase", "train", {"steps": settings.steps}, Stage.TUNING)
    if log.state:
        done = log.state["step"]
        facts = {"done": done, "held_out": None}
        yield Record("step", f"continues after step {done}", facts)
    folder, values = Path(plan.config.output.path), plan.config.dump()
    with trackers(settings.log_with, folder.name, folder / TRACKERS, values, plan.ranks) as track:
        for step in steps:
            track(step.step, log.rows[-1].facts())
            yield Record("step", _progress(step), {"done": step.step, "held_out": step.held_out})
    return log.rows


def _progress(step: TrainingStep) -> str:
    """Return a step in words."""
    facts = [f"step {step.step}"]
    if step.loss is not None:
        facts.append(f"loss {number(step.loss)}")
    if step.held_out is not None:
        facts.append(f"held out {number(step.held_out)}")
    if step.achieved is not None:
        facts.append(f"{percent(step.achieved)} pruned")
    return ", ".join(facts)


def training_facts(base: float, history: Sequence[Row], *, gradual: bool) -> dict[str, Any]:
    """Return the section of a report about training.

    Args:
        base: Held-out loss of the dense model.
        history: The recorded steps.
        gradual: The model was pruned while it was trained, so that no loss is that of the pruned
            model before training.
    """
    facts = summarize(base, [row.step for row in history])
    if gradual:
        facts |= {"post": None, "recovery": None}
    return facts | {"history": [row.facts() for row in history]}
