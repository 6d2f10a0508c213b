"""Companions: files besides config and weights that a checkpoint needs.

They are copied into the output: tokenizer, processors, generation settings, chat templates,
licences. All other files are not, among them those that would be wrong with pruned weights:
adapters, indices, weights in other formats, training states, and code, which is never run.
"""

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from prunekit.checkpoint.atomic import json_bytes
from prunekit.checkpoint.weight_files import is_file
from prunekit.errors import CheckpointError

NAMES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "dict.txt",
    "emoji.json", "byte_maps.json", "normalizer.json", "entity_vocab.json",
    "word_pronunciation.json", "word_shape.json", "prophetnet.tokenizer", "sentencepiece.bpe.model",
    "sentencepiece.model", "spiece.model", "spm.model", "spm_char.model", "source.spm",
    "target.spm", "target_vocab.json", "vocab-src.json", "vocab-tgt.json", "tiktoken.model",
    "tekken.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "audio_tokenizer_config.json", "chat_template.json",
    "chat_template.jinja",
)  # fmt: skip
"""Files that the tokenizers, processors and models of transformers read."""
TEMPLATES = "additional_chat_templates"
"""Folder of further chat templates."""
VERSIONED = ("tokenizer.*.json", "tokenizer.model.*", "*.tiktoken")
"""Patterns of tokenizer files with a version or a model in their name."""
LICENCES = (
    "*license*", "*licence*", "copying*", "copyright*", "notice*", "*use_policy*", "*use-policy*",
    "terms*",
)  # fmt: skip
"""Patterns of files whose text a copy of the weights has to carry, in lower case."""
WRITTEN = {
    "README.md",
    "config.json",
    "journal.jsonl",
    "calibration.json",
    "status.json",
    "training.csv",
} | {f"report.{kind}" for kind in ("json", "html", "csv")}
"""Files that a run writes itself."""
CODE_KEY = "auto_map"
"""Key of JSON files for classes whose code comes with the checkpoint."""
ADAPTER = "adapter_config.json"
NAMED = 6
"""Number of files that a note names."""


def companions(folder: Path) -> list[Path]:
    """Return the files to copy, sorted.

    Raises:
        CheckpointError: One of them is a folder, a link to nothing, or cannot be read.
    """
    found = [path for path in folder.iterdir() if _is_companion(path)]
    templates = folder / TEMPLATES
    found += templates.glob("*.jinja") if templates.is_dir() else []
    for path in found:
        _check_readable(path)
    return sorted(found)


def companion_content(path: Path) -> bytes:
    """Return the content of a companion, without references to own code.

    The code in a checkpoint is not copied.
    """
    content = path.read_bytes()
    if path.suffix != ".json" or CODE_KEY.encode() not in content:
        return content
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(values, dict) or not any(map(_names_own_code, _references(values))):
        return content
    return json_bytes(without_code(values))


def without_code(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a JSON file without references to code."""
    return {
        key: without_code(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key != CODE_KEY
    }


def companion_notes(folder: Path, copied: set[Path]) -> Iterator[str]:
    """Yield notes about the files that are not copied.

    Args:
        folder: Folder of the checkpoint.
        copied: Its companions and weight files.
    """
    left = sorted(
        f"{path.name}/" if path.is_dir() else path.name
        for path in folder.iterdir()
        if path not in copied
        and path.name not in WRITTEN
        and path.name != TEMPLATES
        and not path.name.startswith((".", "__pycache__"))
    )
    if left:
        more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        yield f"Not copied, as no part of a pruned checkpoint: {', '.join(left[:NAMED])}{more}."
    if ADAPTER in left:
        yield (
            f"{ADAPTER}: the folder also holds a LoRA adapter, which transformers adds where peft "
            "is installed. The weights are pruned without it; merge it first if it is to count."
        )
    links = [path for path in sorted(copied) if path.is_symlink() and not _is_near(path, folder)]
    if links:
        shown = ", ".join(f"{path.name} to {path.resolve()}" for path in links[:NAMED])
        more = f" and {len(links) - NAMED} more" if len(links) > NAMED else ""
        yield f"Links out of the folder, whose targets are read in their place: {shown}{more}."
    if any(name.endswith(".py") for name in left):
        yield (
            f"Code that comes with a checkpoint is never run nor copied, and {CODE_KEY}, which "
            "names it, is left out."
        )


def _is_near(path: Path, folder: Path) -> bool:
    """Return whether a file belongs to a folder or its hub cache."""
    near = folder.resolve()
    near = near.parents[1] if near.parent.name == "snapshots" else near
    return path.resolve().is_relative_to(near)


def _is_companion(path: Path) -> bool:
    if path.name in NAMES:
        return True
    patterns = (*VERSIONED, *LICENCES)
    return not path.is_dir() and any(fnmatchcase(path.name.lower(), each) for each in patterns)


def _check_readable(path: Path) -> None:
    # Opening a named pipe would block.
    reason = "" if is_file(path) else "it is no file, or a link to nothing"
    if not reason:
        try:
            path.open("rb").close()
        except OSError as error:
            reason = str(error.strerror)
    if not reason and path.name == "generation_config.json" and _is_no_object(path):
        reason = "transformers opens no model beside one that is not a JSON object"
    if reason:
        raise CheckpointError(
            f"{path}: cannot be read ({reason}), but the output needs a copy of it. Restore or "
            "remove it."
        )


def _is_no_object(path: Path) -> bool:
    """Return whether a file holds JSON, but no object."""
    try:
        return not isinstance(json.loads(path.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False  # transformers ignores it


def _references(values: Mapping[str, Any]) -> Iterator[Any]:
    """Yield all references to code in a table, at any depth."""
    for key, value in values.items():
        if key == CODE_KEY:
            yield value
        elif isinstance(value, dict):
            yield from _references(value)


def _names_own_code(references: Any) -> bool:  # noqa: ANN401  as parsed
    """Return whether an ``auto_map`` names code in the checkpoint itself.

    Names of code in another repository hold "--".
    """
    classes = references.values() if isinstance(references, dict) else [references]
    flat = [
        name for each in classes for name in (each if isinstance(each, list | tuple) else [each])
    ]
    return any(isinstance(name, str) and "--" not in name for name in flat)
