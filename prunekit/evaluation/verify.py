"""Verify written checkpoints: recount zeros and reopen with stock transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.checkpoint.atomic import file_sha256
from prunekit.checkpoint.reader import Checkpoint, open_checkpoint
from prunekit.errors import CheckpointError, ConfigError, ShapeError
from prunekit.evaluation.proof import Check, check_recorded_answers, make_proof, proof_ids
from prunekit.models.empty_model import empty_model
from prunekit.models.hf_config import read_hf_config
from prunekit.models.memory import report_exhausted
from prunekit.models.units.emptied import emptied
from prunekit.models.units.find import unit_groups
from prunekit.models.weight_names import stored_names
from prunekit.patterns import Pattern, parse
from prunekit.reports import report as reports

__all__ = ["Check", "make_proof", "recount_zeros", "verify"]


def recount_zeros(
    checkpoint: Checkpoint,
    layers: list[dict[str, Any]],
    pattern: Pattern,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Count zeros and pattern violations of pruned linears in the files.

    Args:
        checkpoint: The written checkpoint.
        layers: Layer entries of the report, with ``tensor`` (weight name in the file),
            ``transposed``, ``sparsity`` and, if it differs from the run's, ``pattern``.
        pattern: Pattern of the run.
        device: Device that counts; None for the CPU.
    """
    zeros = broken = 0
    for layer in layers:
        weight = _outputs_first(checkpoint, layer).to(device)
        zeros += weight.numel() - int(weight.count_nonzero())
        # A sparsity of 0 means that the layer was deliberately left dense.
        if layer["sparsity"] > 0:
            own = parse(layer["pattern"]) if "pattern" in layer else pattern
            broken += own.violations(weight != 0)
    return {"zeros": zeros, "violations": broken}


@report_exhausted()
def verify(path: str | Path) -> list[Check]:
    """Verify a pruned folder: files, zeros or units, pattern and model outputs.

    Outputs are recomputed in a fresh process by stock transformers.

    Raises:
        PrunekitError: prunekit did not write the folder, or its files are invalid.
    """
    folder = Path(path)
    report = reports.load(folder)
    if report.get("kind") == reports.SWEEP:
        raise ConfigError(f"{folder}: holds a sweep. Verify the folders of its runs, in runs/.")
    checkpoint = open_checkpoint(folder)
    files = _check_files(checkpoint, report.get("files") or {})
    if report.get("kind") == reports.UNITS:
        checks = [files, _check_units(checkpoint, report)]
    else:
        checks = [files, *_check_zeros(checkpoint, report)]
    return [*checks, _check_answers(checkpoint, report)]


def _check_answers(checkpoint: Checkpoint, report: dict[str, Any]) -> Check:
    """Compare the outputs of a fresh process with the proof."""
    proof = report.get("proof")
    if proof is None:
        return Check("answers", passed=False, detail="the report has no proof to compare with")
    if proof["ids"] != proof_ids(read_hf_config(checkpoint)).tolist():
        detail = "proof.ids of the report are not the tokens that a run gives to this model"
        return Check("answers", passed=False, detail=detail)
    return check_recorded_answers(checkpoint, proof)


def _check_zeros(checkpoint: Checkpoint, report: dict[str, Any]) -> list[Check]:
    """Count zeros and pattern violations of the pruned linears.

    Raises:
        CheckpointError: The report does not describe this checkpoint.
    """
    layers, expected = report["layers"], report["sparsity"]
    where = checkpoint.folder / reports.JSON
    try:
        pattern = parse(expected["pattern"])
        for layer in layers:
            _check_layer(checkpoint, layer, pattern)
        counts = recount_zeros(checkpoint, layers, pattern)
    except (ConfigError, ShapeError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    return [
        Check(
            "zeros",
            counts["zeros"] == expected["zeros"],
            f"{counts['zeros']:,} zeros in {len(layers)} linears, the report says "
            f"{expected['zeros']:,}",
        ),
        Check(
            "pattern",
            counts["violations"] == 0,
            f"{counts['violations']} groups break {pattern.name}",
        ),
    ]


def _check_layer(checkpoint: Checkpoint, layer: dict[str, Any], pattern: Pattern) -> None:
    """Refuse a layer of the report that the checkpoint cannot have.

    Args:
        checkpoint: The written checkpoint.
        layer: Entry of the report.
        pattern: Pattern of the run.

    Raises:
        CheckpointError: The tensor is missing or has another shape.
        ShapeError: The pattern does not fit the shape.
    """
    name, shape = layer["tensor"], list(layer["shape"])
    entry = checkpoint.entry(name)
    if entry is None:
        raise CheckpointError(f"{checkpoint.folder}: {name}, which the report names, is missing.")
    found = list(entry.shape)
    if found != (shape[::-1] if layer["transposed"] else shape):
        raise CheckpointError(
            f"{checkpoint.folder}: {name} has shape {found}, the report says {shape}, outputs "
            "first. They do not belong together."
        )
    own = parse(layer["pattern"]) if "pattern" in layer else pattern
    if layer["sparsity"] > 0 and (reason := own.why_not_applicable(*shape)):
        raise ShapeError(f"{layer['name']}: {reason}.")


def _check_files(checkpoint: Checkpoint, digests: dict[str, str]) -> Check:
    """Compare the digests of weight files and adapters with the report."""
    folder, sound = checkpoint.folder, f"{len(checkpoint.entries)} tensors, headers are sound"
    if not digests:
        return Check("files", passed=True, detail=f"{sound}; the report has no digests")
    used = {entry.file for entry in checkpoint.file_entries.values()}
    for file in sorted(used | {folder / name for name in digests}):
        name = file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)
        if name not in digests:
            return Check("files", passed=False, detail=f"{name} is no file of the run")
        if not file.is_file():
            return Check("files", passed=False, detail=f"{name}, a file of the run, is missing")
        if file_sha256(file) != digests[name]:
            return Check("files", passed=False, detail=f"{name} differs from the file of the run")
    return Check("files", passed=True, detail=f"{sound}, digests as the report says")


def _check_units(checkpoint: Checkpoint, report: dict[str, Any]) -> Check:
    """Count the units of each group by the shapes in the files."""
    model = empty_model(checkpoint)
    stored_names(model, checkpoint)  # raises if shapes in the files contradict the config
    expected = {layer["name"]: len(layer["kept"]) for layer in report["layers"]}
    kinds = dict.fromkeys(layer["kind"] for layer in report["layers"])
    counts = {group.name: group.units for kind in kinds for group in unit_groups(model, kind)}
    counts |= {name: 0 for kind in kinds for name in emptied(model, kind)}
    wrong = [name for name in expected if counts.get(name) != expected[name]]
    detail = f"{sum(counts.values()):,} units in {len(counts)} places, as the report says"
    if wrong:
        detail = (
            f"{wrong[0]} has {counts.get(wrong[0], 'none')}, the report says {expected[wrong[0]]}"
        )
    return Check("units", not wrong, detail)


def _outputs_first(checkpoint: Checkpoint, layer: dict[str, Any]) -> Tensor:
    tensor = checkpoint.read([layer["tensor"]])[layer["tensor"]]
    return tensor.T if layer["transposed"] else tensor
