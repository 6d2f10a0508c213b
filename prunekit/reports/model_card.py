"""Model card of a pruned model, from its report.

Licence, language and tags are those of the model that was pruned, from its own card.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunekit import formatting
from prunekit.checkpoint import adapter
from prunekit.checkpoint.atomic import write_atomically
from prunekit.checkpoint.hub import CARD
from prunekit.checkpoint.packed import LIBRARY
from prunekit.checkpoint.weight_files import is_file
from prunekit.models.auto_class import AutoClass, auto_class
from prunekit.reports import citation

KEPT = (
    "base_model", "license", "license_name", "license_link", "language", "tags", "pipeline_tag",
    "datasets",
    "extra_gated_prompt", "extra_gated_fields", "extra_gated_heading", "extra_gated_description",
    "extra_gated_button_content",
)  # fmt: skip
"""Entries of the card of a model that hold for a pruned copy too."""
LISTS = {"base_model", "license", "language", "tags", "datasets"}
"""Those that may be lists of texts; the others are one text."""
TABLE = "extra_gated_fields"
"""The one that is a table: questions to who asks for access."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def source_facts(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what a model's card says about copies, and notes.

    Args:
        folder: Folder of the model.

    Returns:
        Entries of its card, and notes on what of it cannot be read.
    """
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    file = folder / CARD
    if not is_file(file):
        return {}, []
    try:
        found = metadata_load(file) or {}
    except (OSError, ValueError, RecursionError, YAMLError) as error:
        deep = isinstance(error, RecursionError)  # whose text depends on the caller
        reason = "nested too deep" if deep else " ".join(str(error).split())
        return {}, [f"{file}: its metadata cannot be read ({reason}): the new card has no licence."]
    there = {key: found[key] for key in KEPT if found.get(key) is not None}
    kept = {key: value for key, value in there.items() if _is_valid(key, value)}
    return kept, [
        f"{file}: {key} is no {'table' if key == TABLE else 'text'}"
        f"{' or list of texts' if key in LISTS else ''} in its metadata, so the new card leaves it "
        "out. Words that YAML reads as no text, such as no, need quotes."
        for key in there
        if key not in kept
    ]


def _is_valid(key: str, value: object) -> bool:
    """Return whether an entry of a card has the hub's type."""
    if key == TABLE:
        return isinstance(value, dict) and _is_json(value)
    if key in LISTS and isinstance(value, list):
        return all(isinstance(each, str) and _is_json(each) for each in value)
    return isinstance(value, str) and _is_json(value)


def _is_json(value: object) -> bool:
    """Return whether JSON in UTF-8 can hold a value.

    It holds no date, no cycle and no half of a character.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def write(report: Mapping[str, Any], folder: Path, source: Mapping[str, Any]) -> None:
    """Write the card of a finished run atomically.

    Args:
        report: Report of the run.
        folder: Its output folder.
        source: Entries of the card of the model, from :func:`source_facts`.
    """
    write_atomically(folder / CARD, render(report, folder, source).encode())


def render(report: Mapping[str, Any], folder: Path, source: Mapping[str, Any]) -> str:
    """Return the card of a finished run.

    Args:
        report: Report of the run.
        folder: Its output folder.
        source: Entries of the card of the model.
    """
    import jinja2
    from huggingface_hub import ModelCard

    model, name = report["model"], folder.resolve().name  # "." has none
    opened = auto_class(model["model_type"], model["architecture"])
    evaluation = report.get("evaluation") or []
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = page.get_template("model_card.md.j2").render(
        card_data=_card_data(report, folder, source, opened).to_yaml(),
        name=_cell(name),
        paragraph=citation.paragraph(dict(report)).translate(citation.MARKDOWN),
        evaluation=[_row(each) for each in evaluation],
        protocols=list(dict.fromkeys(_cell(each["protocol"]) for each in evaluation)),
        needs_prunekit=_needs_prunekit(report),
        library=LIBRARY if (report.get("storage") or {}).get("quantized") else None,
        auto_class=opened.name,
        repository=name,
        adapter=adapter.FOLDER if adapter.is_beside(folder) else None,
        storage=_storage(report),
        version=report["prunekit"],
    )
    return str(ModelCard(text))


def _card_data(
    report: Mapping[str, Any], folder: Path, source: Mapping[str, Any], opened: AutoClass
) -> Any:  # noqa: ANN401  its class is loaded late
    from huggingface_hub import ModelCardData

    path = str(report["model"].get("path") or "")
    base = path if HUB_NAME.fullmatch(path) else source.get("base_model")
    tags = source.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    entries = {
        "library_name": "transformers",
        "pipeline_tag": opened.task,
        **{key: value for key, value in source.items() if key != "tags"},
        "tags": [*dict.fromkeys([*map(str, tags), "pruned", "prunekit"])],
        "base_model": base,
    }
    if results := _results(report, entries["pipeline_tag"] or "other"):
        entries |= {"model_name": folder.resolve().name, "eval_results": results}
    return ModelCardData(**{key: value for key, value in entries.items() if value is not None})


def _results(report: Mapping[str, Any], task: str) -> list[Any]:
    """Return the measures after pruning, as the hub shows them."""
    from huggingface_hub import EvalResult

    found = {
        (each["data"], each["metric"]): float(each["after"])
        for each in report.get("evaluation") or []
        if each.get("after") is not None
    }
    return [
        EvalResult(
            task_type=task,
            dataset_type=data,
            dataset_name=data,
            metric_type=metric.replace(" ", "_"),
            metric_value=round(value, 6),
            metric_name=metric,
        )
        for (data, metric), value in found.items()
        if math.isfinite(value)
    ]


def _row(evaluation: Mapping[str, Any]) -> list[str]:
    metric, before, after = evaluation["metric"], evaluation.get("before"), evaluation.get("after")
    return [
        _cell(evaluation["data"]),
        _cell(metric),
        formatting.measured(metric, before),
        formatting.measured(metric, after),
        formatting.measured_change(metric, before, after),
    ]


def _cell(text: object) -> str:
    return formatting.printable(str(text)).translate(citation.MARKDOWN)


def _needs_prunekit(report: Mapping[str, Any]) -> bool:
    storage = report.get("storage") or {}
    return storage.get("format", "dense") != "dense" or report.get("stock") is False


def _storage(report: Mapping[str, Any]) -> str:
    """Return how the weights are stored, and how that is checked."""
    storage, sparsity = report.get("storage") or {}, report["sparsity"]
    how = "Smaller matrices; nothing of what was removed is stored."
    if "zeros" in sparsity:
        how = f"Zeros are stored as {storage.get('format', 'dense')} weights."
    if quantized := storage.get("quantized"):
        how = f"Weights are quantized ({quantized['words']}); zeros are codes of 0."
    return (
        f"{how} `prunekit verify` counts them again and compares the outputs of the model with "
        "those of the run."
    )
