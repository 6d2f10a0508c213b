"""The texts and labelled rows of a run: calibration and evaluation data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from prunekit.config.evaluate_table import Evaluate
from prunekit.config.run_config import Config, StructuredConfig
from prunekit.config.tables import Calibration
from prunekit.data.labelled import LabelledTask
from prunekit.data.labelled_tokens import LabelledData
from prunekit.data.row_samples import RowSamples
from prunekit.data.samples import Samples
from prunekit.data.sources import title
from prunekit.data.tokens import Tokens, calibration_tokens, evaluation_tokens
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError
from prunekit.evaluation.harness_tasks import HarnessTasks, load_tasks
from prunekit.evaluation.labelled import METRICS, labelled_measures
from prunekit.evaluation.perplexity import Evaluator
from prunekit.models.layout import is_causal_language_model
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.pipeline import batch_tokens
from prunekit.runs.image_data import check_images, check_part, image_sources
from prunekit.runs.plan_base import PlanBase
from prunekit.runs.sound_data import check_sounds, sound_sources
from prunekit.structured.batches import Batch
from prunekit.structured.block_batches import to_device

Data = Tokens | Samples | RowSamples
"""Tokenized text in windows of one length, labelled samples, or images or sound with text."""


def check_data(
    config: Config | StructuredConfig, model: PreTrainedModel, stacks: list[StackRunner]
) -> None:
    """Refuse labelled rows, images and evaluations that do not fit the model.

    Files are read; data sets of the hub are not.

    Args:
        config: The user's config.
        model: The model, with or without weights.
        stacks: Runners of its block stacks.

    Raises:
        ConfigError: A task does not fit the model, a file has no rows, lacks a column or has a
            label that is no class; or [evaluate] asks for perplexity of another model than a causal
            language model.
    """
    for name, table in (("calibration", config.calibration), ("evaluate", config.evaluate)):
        if not table or not table.task:
            continue
        with _prefixed(f"{name}."):
            task = LabelledTask.of(table.task, table.columns, model)
        with _prefixed(f"{name}.data: "):
            task.examples([source for source in table.data if not source.startswith("hub:")])
    check_part(config, stacks)
    check_images(config, model, stacks)
    check_sounds(config, model, stacks)
    if config.evaluate and not is_causal_language_model(model, stacks):
        _check_measurable(config.evaluate, f"{config.model.path}: {type(model).__name__}")
    if tasks := tasks_of(config.evaluate):
        load_tasks(tasks)


def _check_measurable(evaluate: Evaluate, model: str) -> None:
    """Refuse measures that are for causal language models alone."""
    if evaluate.data and not evaluate.task:
        raise ConfigError(
            f"{model} has no perplexity, which is for causal language models. Leave out "
            "[evaluate], or set evaluate.task and name labelled data."
        )
    if evaluate.tasks:
        raise ConfigError(
            f"{model} cannot be asked the questions of evaluate.tasks, which are for causal "
            "language models. Leave the key out, or set evaluate.task and name labelled data."
        )


def tasks_of(evaluate: Evaluate | None) -> HarnessTasks | None:
    """Return the tasks of lm-eval that a table [evaluate] names, or None."""
    if evaluate is None or not evaluate.tasks:
        return None
    return HarnessTasks(tuple(evaluate.tasks), evaluate.few_shot, evaluate.limit)


def data_words(config: Config | StructuredConfig, lengths: tuple[int, int]) -> dict[str, str]:
    """Return calibration and evaluation as rows of a printed plan."""
    rows = {}
    if calibration := config.calibration:
        kinds = {"images": image_sources(config), "sound": sound_sources(config)}
        rowwise = calibration.task or any(kinds.values())
        most = f"rows of at most {lengths[0]}" if rowwise else f"samples of {lengths[0]}"
        rows["calibration"] = f"{calibration.samples} {most} tokens, seed {calibration.seed}"
        for kind, found in kinds.items():
            if found:
                rows["calibration"] += f", of {', '.join(map(title, found))} ({kind} with text)"
        if calibration.task:
            rows["calibration"] += f", {_described(calibration)}"
    evaluate = config.evaluate
    if evaluate and evaluate.tasks:
        shots = "" if evaluate.few_shot is None else f", {evaluate.few_shot}-shot"
        limit = f", the first {evaluate.limit} questions of each" if evaluate.limit else ""
        rows["tasks"] = f"{', '.join(map(title, evaluate.tasks))} (lm-eval{shots}{limit})"
    if evaluate and evaluate.task:
        which = f"the first {evaluate.samples} rows" if evaluate.samples else "all rows"
        measures = " and ".join(METRICS[evaluate.task])
        rows["evaluate"] = f"{measures} on {which} of {_described(evaluate)}"
    return rows


def _described(table: Calibration | Evaluate) -> str:
    return f"{', '.join(map(title, table.data))} ({table.task})"


def calibration_data(plan: PlanBase, ranks: Ranks = SINGLE) -> Data | None:
    """Tokenize the calibration data; None if the run reads none.

    ``ranks``: the processes that share the samples.

    Raises:
        ConfigError: A source cannot be read, or there are fewer samples than processes.
    """
    config = plan.config.calibration
    if config is None or config.self_generated:
        return None
    length = plan.lengths[0]
    if plan.images:
        found: Data = plan.images
    elif config.task:
        task = LabelledTask.of(config.task, config.columns, plan.model)
        labelled = LabelledData(task, plan.tokenizer, config.data, length)
        found = labelled.sample(config.samples, config.seed)
    else:
        found = calibration_tokens(
            plan.tokenizer, config.data, config.samples, length, config.seed, limit=plan.token_limit
        )
    if len(found) < ranks.size:
        raise ConfigError(
            f"calibration.data: there is text for {len(found)} samples, which {ranks.size} "
            "processes cannot share. Start fewer, or use more text."
        )
    return found


def evaluation_data(plan: PlanBase) -> dict[str, Data]:
    """Tokenize the evaluation data of each source.

    Raises:
        ConfigError: A source cannot be read.
    """
    config = plan.config.evaluate
    if config is None:
        return {}
    length, tokenizer = plan.lengths[1], plan.tokenizer
    if config.task:
        task = LabelledTask.of(config.task, config.columns, plan.model)
        return {
            source: LabelledData(task, tokenizer, [source], length).first(config.samples)
            for source in config.data
        }
    limit = plan.token_limit
    return {
        source: evaluation_tokens(
            tokenizer, [source], length, config.windows, stride=config.stride, limit=limit
        )
        for source in config.data
    }


def own_batches(data: Data, device: torch.device, ranks: Ranks = SINGLE) -> list[Batch]:
    """Return a rank's batches without padding, on which blocks are run.

    Args:
        data: Calibration data of all ranks.
        device: Device of the batches, whose kind decides their size.
        ranks: Processes that share the samples.
    """
    batches = data.even_batches(batch_tokens(device), ranks.shard(len(data)))
    if isinstance(data, RowSamples):
        return batches  # each goes to the device when it is read
    return [to_device(batch, device) for batch in batches]


def metrics(plan: PlanBase) -> tuple[str, ...]:
    """Return the metrics that are measured before and after."""
    task = plan.config.evaluate and plan.config.evaluate.task
    return METRICS[task] if task else ("perplexity",)


def measures(
    plan: PlanBase, evaluator: Evaluator, data: Data, ranks: Ranks
) -> dict[str, dict[str, Any]]:
    """Return the measures of a model on one source, by metric.

    Args:
        plan: The plan of the run.
        evaluator: Evaluator of the dense or the pruned checkpoint.
        data: The tokens or samples of the source.
        ranks: Processes that share them.
    """
    if isinstance(data, Tokens):
        found = [evaluator.perplexity(data, ranks)]
    else:
        evaluate = plan.config.evaluate
        assert evaluate is not None
        assert evaluate.task is not None
        assert isinstance(data, Samples)
        found = labelled_measures(evaluator, data, evaluate.task, ranks)
    return {each["metric"]: each for each in found}


@contextmanager
def _prefixed(place: str) -> Iterator[None]:
    """Name the place in the config in front of a message."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{place}{error}") from error
