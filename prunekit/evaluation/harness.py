"""Tasks of lm-evaluation-harness, such as arc_easy, on a checkpoint.

The whole model runs, in transformers. Where it is larger than the device, accelerate places its
parts on all devices, in main memory and in files, and fetches each when it runs.

Source: Gao et al., The Language Model Evaluation Harness, doi.org/10.5281/zenodo.12608602.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from prunekit.checkpoint import adapter
from prunekit.checkpoint.hub import checkpoint_folder
from prunekit.checkpoint.reader import Checkpoint, open_checkpoint
from prunekit.data.sources import missing_package
from prunekit.errors import ConfigError
from prunekit.evaluation.harness_tasks import SEED, HarnessTasks, load_tasks, quiet, seeded, version
from prunekit.formatting import FRACTIONS
from prunekit.models.devices import loss_dtype, resolve_device, stored_dtype
from prunekit.models.empty_model import empty_model, max_tokens
from prunekit.models.load import open_whole
from prunekit.models.memory import report_exhausted
from prunekit.models.sequential.pipeline import batch_tokens
from prunekit.models.vocabulary import load_tokenizer

REQUEST_TOKENS = 256
"""Tokens of a request, with which the size of a batch is chosen; longer ones need more memory."""


def harness_measures(
    checkpoint: Checkpoint, tasks: HarnessTasks, device: torch.device
) -> list[dict[str, Any]]:
    """Return the metrics of tasks on a checkpoint, with their protocol.

    Args:
        checkpoint: A causal language model; an adapter beside it is applied, with peft.
        tasks: The tasks.
        device: Device to run on.

    Returns:
        ``data`` (the task), ``source``, ``metric``, ``value``, ``stderr`` (None where it is not a
        share of documents), ``samples``, ``higher_is_better``, ``harness`` (versions and
        settings) and ``protocol`` of each metric of each task or group.

    Raises:
        ConfigError: As of :func:`load_tasks`.
        CheckpointError: transformers cannot open the model.
    """
    loaded = load_tasks(tasks)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEED)  # each request draws on: before and after draw the same
    dtype = loss_dtype(stored_dtype(checkpoint), device)
    with (
        open_whole(checkpoint, dtype, device) as model,
        quiet(),
        seeded(),
    ):
        from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]  an extra

        lm = _language_model(_adapted(model, checkpoint), checkpoint, device)
        found: Any = evaluate(
            lm=lm, task_dict=loaded, limit=tasks.limit, bootstrap_iters=0, log_samples=False
        )
        how = f"batches of {lm.batch_size_per_gpu}, {str(dtype).removeprefix('torch.')} model"
    if adapter.is_beside(checkpoint.folder):
        how += ", with the adapter that lies beside it"
    return [measure for name in _shown(loaded) for measure in _measures(found, name, how)]


@report_exhausted()
def evaluate_tasks(path: str, tasks: HarnessTasks, device: str = "auto") -> list[dict[str, Any]]:
    """Return the metrics of tasks on a checkpoint of a path.

    Args:
        path: Folder or name of the checkpoint.
        tasks: The tasks.
        device: Device as in a config.
    """
    load_tasks(tasks)
    checkpoint = open_checkpoint(checkpoint_folder(path))
    return harness_measures(checkpoint, tasks, resolve_device(device))


def _language_model(model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device) -> Any:  # noqa: ANN401
    """Return the model as the harness calls it."""
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]  an extra

    lm = HFLM(
        pretrained=model,
        tokenizer=load_tokenizer(checkpoint),
        batch_size=max(1, batch_tokens(device) // REQUEST_TOKENS),
        max_length=max_tokens(empty_model(checkpoint)),
    )
    lm._device = device  # the first weight of a model that accelerate has placed may be elsewhere
    return lm


def _adapted(model: PreTrainedModel, checkpoint: Checkpoint) -> PreTrainedModel:
    """Return a model with the adapter beside its weights, if any."""
    if not adapter.is_beside(checkpoint.folder):
        return model
    folder = checkpoint.folder / adapter.FOLDER
    if problem := missing_package("evaluate.tasks", "peft", "lora"):
        raise ConfigError(f"{problem}, for the adapter of {folder}.")
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()  # pyright: ignore


def _shown(loaded: Mapping[str, Any]) -> list[str]:
    """Return groups with figures of their own, and other tasks."""
    groups = [name for name, group in loaded["groups"].items() if group.has_aggregation]
    inside = {child for name in groups for child in _members(loaded["group_map"], name)}
    return [name for name in [*groups, *loaded["tasks"]] if name not in inside]


def _members(children: Mapping[str, list[str]], name: str) -> Iterator[str]:
    for child in children.get(name, ()):
        yield child
        yield from _members(children, child)


def _measures(found: Mapping[str, Any], name: str, how: str) -> Iterator[dict[str, Any]]:
    """Yield the metrics of a task or group."""
    results = {**found["results"], **(found.get("groups") or {})}[name]
    counts = found["n-samples"].get(name)
    used, whole = (counts["effective"], counts["original"]) if counts else (None, None)
    defined, shots = found["versions"].get(name), found["n-shot"].get(name)
    asked = "" if used is None else f", {_documents(used, whole)}"
    protocol = (
        f"lm-eval {version()}, {name} version {defined}"
        f"{'' if shots is None else f', {shots}-shot'}{asked}; {how}"
    )
    facts = {"lm_eval": version(), "task_version": str(defined), "few_shot": shots}
    for key, value in results.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        yield {
            "data": name,
            "source": name,
            "metric": metric if filtered == "none" else f"{metric}, {filtered}",
            "value": float(value),
            "stderr": _standard_error(metric, float(value), used),
            "samples": used,
            "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
            "harness": facts | {"documents": whole},
            "protocol": protocol,
        }


def _documents(used: int, whole: int | None) -> str:
    return f"all {whole} documents" if used == whole else f"the first {used} of {whole} documents"


def _standard_error(metric: str, value: float, count: int | None) -> float | None:
    """Return the standard error of a share, None of other metrics."""
    if metric not in FRACTIONS or not count or count < 2:
        return None
    return math.sqrt(max(0.0, value * (1 - value)) / (count - 1))
