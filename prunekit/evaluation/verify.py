"""Proof of what was written: recounted from the files, and reopened by stock transformers.

Shapes: B samples, T tokens, C answers a token (vocabulary, classes or features).
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunekit.checkpoint.atomic import digest
from prunekit.checkpoint.reader import Checkpoint, open_checkpoint
from prunekit.errors import CheckpointError
from prunekit.evaluation.perplexity import Evaluator
from prunekit.models.empty_model import empty_model
from prunekit.models.memory import spread
from prunekit.models.units.find import places
from prunekit.models.units.removal import RECORD
from prunekit.models.weight_names import stored_names
from prunekit.patterns import Pattern, parse
from prunekit.reports import report as reports

PROOF_TOKENS = 16
PROOF_ANSWERS = 32
"""Tokens and answers a token that a proof records: enough that no other weights give the same."""


def recount(
    checkpoint: Checkpoint, layers: list[dict[str, Any]], pattern: Pattern
) -> dict[str, Any]:
    """Count zeros and broken groups of the pruned linears in the files, not in memory.

    Each of ``layers`` has ``tensor``, its weight's name in the file, ``shape``, outputs first, and,
    where that is not the run's, ``pattern``.
    """
    zeros = broken = 0
    for layer in layers:
        weight = _oriented(checkpoint, layer)
        zeros += weight.numel() - int(weight.count_nonzero())
        # A layer that lies at 0 was asked to stay dense.
        if layer["sparsity"] > 0:
            own = parse(layer["pattern"]) if "pattern" in layer else pattern
            broken += own.violations(weight != 0)
    return {"zeros": zeros, "violations": broken}


def prove(checkpoint: Checkpoint, device: torch.device) -> dict[str, Any]:
    """Record what the written model answers to a few tokens, for :func:`verify` to compare."""
    evaluator = Evaluator(checkpoint, device)
    ids = proof_ids(evaluator.model.config)
    answers = evaluator.answers(ids)
    return {
        "ids": ids.tolist(),
        "dtype": str(evaluator.weights.dtype).removeprefix("torch."),
        "device": device.type,
        "answers": sample(answers).tolist(),
    }


def proof_ids(config: Any) -> Int[Tensor, "1 T"]:  # noqa: ANN401
    """Return fixed tokens, spread over the vocabulary, that every model can be asked."""
    config = getattr(config, "text_config", config)
    length = min(PROOF_TOKENS, getattr(config, "max_position_embeddings", None) or PROOF_TOKENS)
    return (torch.arange(1, length + 1) * 7919 % config.vocab_size)[None]


def sample(answers: Float[Tensor, "B ... C"]) -> Float[Tensor, " N"]:
    """Return evenly spread entries of the answers to each token."""
    rows = answers.flatten(0, -2).float()
    columns = torch.linspace(0, rows.shape[1] - 1, min(PROOF_ANSWERS, rows.shape[1])).long()
    return rows[:, columns].flatten()


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, whether it holds, and what was found."""

    name: str
    passed: bool
    detail: str


def verify(path: str | Path) -> list[Check]:
    """Reopen a pruned folder in a fresh process with stock transformers, and count again.

    Raises:
        PrunekitError: It is no folder that prunekit wrote, or its files are not sound.
    """
    folder = Path(path)
    report = reports.load(folder)
    checkpoint = open_checkpoint(folder)
    if report.get("kind") == reports.UNITS:
        return [_check_units(checkpoint, report), _check_answers(checkpoint, report["proof"])]
    missing = [
        layer["tensor"] for layer in report["layers"] if layer["tensor"] not in checkpoint.entries
    ]
    if missing:
        raise CheckpointError(f"{folder}: {missing[0]}, which the report names, is not there.")
    pattern = parse(report["sparsity"]["pattern"])
    found = recount(checkpoint, report["layers"], pattern)
    said = report["sparsity"]
    return [
        _check_files(checkpoint, report.get("files") or {}),
        Check(
            "zeros",
            found["zeros"] == said["zeros"],
            f"{found['zeros']:,} zeros in {len(report['layers'])} linears, the report says "
            f"{said['zeros']:,}",
        ),
        Check(
            "pattern",
            found["violations"] == 0,
            f"{found['violations']} groups break {pattern.name}",
        ),
        _check_answers(checkpoint, report["proof"]),
    ]


def _check_files(checkpoint: Checkpoint, digests: dict[str, str]) -> Check:
    """Look whether files are, to the bit, what the run wrote; one that was converted has others."""
    folder, sound = checkpoint.folder, f"{len(checkpoint.entries)} tensors, headers are sound"
    present = {file.name for file in {entry.file for entry in checkpoint.files.values()}}
    if digests.keys() != present:
        return Check("files", passed=True, detail=sound)
    for name, expected in digests.items():
        if digest(folder / name) != expected:
            return Check("files", passed=False, detail=f"{name} is not what the run wrote")
    return Check("files", passed=True, detail=f"{sound}, digests as the report says")


def _check_units(checkpoint: Checkpoint, report: dict[str, Any]) -> Check:
    """Count the units of each place by the shapes in the files."""
    model = empty_model(checkpoint)
    stored_names(model, checkpoint)  # refuses files of other shapes than the config makes
    left = {layer["name"]: len(layer["kept"]) for layer in report["layers"]}
    kinds = dict.fromkeys(layer["kind"] for layer in report["layers"])
    found = {place.name: place.units for kind in kinds for place in places(model, kind)}
    wrong = [name for name in left if found.get(name) != left[name]]
    detail = f"{sum(found.values()):,} units in {len(found)} places, as the report says"
    if wrong:
        detail = f"{wrong[0]} has {found.get(wrong[0], 'none')}, the report says {left[wrong[0]]}"
    return Check("units", not wrong, detail)


def _check_answers(checkpoint: Checkpoint, proof: dict[str, Any]) -> Check:
    """Compare answers that a process of its own gives.

    Stock transformers, which cannot see prunekit, where weights are dense; with prunekit imported
    where they are compressed or blocks differ in size.
    """
    who = "transformers with prunekit" if _needs_us(checkpoint) else "stock transformers"
    if proof["device"] != "cpu" and not torch.cuda.is_available():
        detail = f"recorded on {proof['device']}, which is not here; nothing was compared"
        return Check("answers", passed=False, detail=detail)
    dtype = getattr(torch, proof["dtype"])
    count = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    with TemporaryDirectory(prefix="prunekit-") as offload:
        places = spread(count * dtype.itemsize, torch.device(proof["device"]), offload)
        given = str(checkpoint.folder.absolute()), json.dumps(proof), json.dumps(places)
        finished = subprocess.run(
            [*_python(checkpoint), *given],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    if finished.returncode:
        last = finished.stderr.strip().splitlines()[-1:] or ["no message"]
        return Check("answers", passed=False, detail=f"{who} fails to open it: {last[0]}")
    answers = torch.tensor(json.loads(finished.stdout))
    expected = torch.tensor(proof["answers"])
    scale = float(expected.abs().max())
    allowed = scale * 32 * torch.finfo(dtype).eps
    differ = float((sample(answers) - expected).abs().max())
    detail = (
        f"{who} answers within {differ:.2g} of what was recorded (allowed "
        f"{allowed:.2g}, largest answer {scale:.3g})"
    )
    return Check("answers", differ <= allowed, detail)


def _needs_us(checkpoint: Checkpoint) -> bool:
    """Say whether stock transformers alone cannot open it."""
    return bool(checkpoint.packed) or RECORD in checkpoint.config


def _python(checkpoint: Checkpoint) -> list[str]:
    if not _needs_us(checkpoint):
        return [sys.executable, "-I", "-c", _STOCK + _ALONE + _ANSWER]
    import prunekit_kernels

    import prunekit

    folders = {str(Path(package.__path__[0]).parent) for package in (prunekit, prunekit_kernels)}
    found = f"import sys; sys.path[:0] = {sorted(folders)!r}\nimport prunekit\n"
    return [sys.executable, "-I", "-c", found + _STOCK + _ANSWER]


_STOCK = """
import json, sys, torch, transformers
folder, (proof, places) = sys.argv[1], map(json.loads, sys.argv[2:])
if places:  # the names of GPUs are numbers
    room = places["max_memory"].items()
    places["max_memory"] = {int(name) if name.isdigit() else name: most for name, most in room}
config = transformers.AutoConfig.from_pretrained(folder)
kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
dtype = getattr(torch, proof["dtype"])
model, notes = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **places)
assert not notes["missing_keys"], f"weights are missing: {sorted(notes['missing_keys'])[:3]}"
"""
_ALONE = """
assert "prunekit" not in sys.modules
"""
_ANSWER = """
ids = torch.tensor(proof["ids"], device=proof["device"])
inputs = {"input_ids": ids}
if config.is_encoder_decoder:
    inputs["decoder_input_ids"] = ids
with torch.inference_mode():
    model = model if places else model.to(proof["device"])
    answers = model.eval()(**inputs)[0]
print(json.dumps(answers.float().cpu().tolist()))
"""


def _oriented(checkpoint: Checkpoint, layer: dict[str, Any]) -> Tensor:
    tensor = checkpoint.read([layer["tensor"]])[layer["tensor"]]
    return tensor.T if layer["transposed"] else tensor
