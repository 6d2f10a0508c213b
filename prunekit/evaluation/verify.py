"""Verify written checkpoints: recount zeros and reopen with stock transformers.

A run records a proof: outputs of the written model for fixed tokens. Verification recomputes these
outputs in a fresh process.

Shapes: B samples, T tokens, C outputs per token (vocabulary, classes or features), N sampled
outputs.
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

import prunekit_kernels
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunekit.checkpoint.atomic import file_sha256
from prunekit.checkpoint.compressed import KEPT_UNITS_KEY
from prunekit.checkpoint.reader import Checkpoint, open_checkpoint
from prunekit.errors import CheckpointError
from prunekit.evaluation.perplexity import Evaluator
from prunekit.models.empty_model import empty_model
from prunekit.models.memory import device_map_options
from prunekit.models.units.find import unit_groups
from prunekit.models.weight_names import stored_names
from prunekit.patterns import Pattern, parse
from prunekit.reports import report as reports

PROOF_TOKENS = 16
PROOF_OUTPUTS = 32
"""Tokens of a proof, and outputs recorded per token: enough to tell any two models apart."""


def recount_zeros(
    checkpoint: Checkpoint, layers: list[dict[str, Any]], pattern: Pattern
) -> dict[str, Any]:
    """Count zeros and pattern violations of pruned linears in the files.

    Args:
        checkpoint: The written checkpoint.
        layers: Layer entries of the report, with ``tensor`` (weight name in the file),
            ``transposed``, ``sparsity`` and, if it differs from the run's, ``pattern``.
        pattern: Pattern of the run.
    """
    zeros = broken = 0
    for layer in layers:
        weight = _outputs_first(checkpoint, layer)
        zeros += weight.numel() - int(weight.count_nonzero())
        # A sparsity of 0 means that the layer was deliberately left dense.
        if layer["sparsity"] > 0:
            own = parse(layer["pattern"]) if "pattern" in layer else pattern
            broken += own.violations(weight != 0)
    return {"zeros": zeros, "violations": broken}


def make_proof(checkpoint: Checkpoint, device: torch.device) -> dict[str, Any]:
    """Record outputs of the written model for :func:`verify` to compare."""
    evaluator = Evaluator(checkpoint, device)
    ids = proof_ids(evaluator.model.config)
    outputs = evaluator.outputs(ids)
    return {
        "ids": ids.tolist(),
        "dtype": str(evaluator.weights.dtype).removeprefix("torch."),
        "device": device.type,
        "answers": sample_outputs(outputs).tolist(),
    }


def proof_ids(config: Any) -> Int[Tensor, "1 T"]:  # noqa: ANN401
    """Return fixed tokens, spread over the vocabulary, that fit every model."""
    config = getattr(config, "text_config", config)
    length = min(PROOF_TOKENS, getattr(config, "max_position_embeddings", None) or PROOF_TOKENS)
    return (torch.arange(1, length + 1) * 7919 % config.vocab_size)[None]


def sample_outputs(outputs: Float[Tensor, "B ... C"]) -> Float[Tensor, " N"]:
    """Return evenly spaced entries of the outputs for each token."""
    rows = outputs.flatten(0, -2).float()
    columns = torch.linspace(0, rows.shape[1] - 1, min(PROOF_OUTPUTS, rows.shape[1])).long()
    return rows[:, columns].flatten()


@dataclass(frozen=True)
class Check:
    """Result of one check: its name, whether it passed, and details."""

    name: str
    passed: bool
    detail: str


def verify(path: str | Path) -> list[Check]:
    """Verify a pruned folder: files, zeros, pattern and model outputs.

    Outputs are recomputed in a fresh process by stock transformers.

    Raises:
        PrunekitError: prunekit did not write the folder, or its files are invalid.
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
        raise CheckpointError(f"{folder}: {missing[0]}, which the report names, is missing.")
    pattern = parse(report["sparsity"]["pattern"])
    counts = recount_zeros(checkpoint, report["layers"], pattern)
    expected = report["sparsity"]
    return [
        _check_files(checkpoint, report.get("files") or {}),
        Check(
            "zeros",
            counts["zeros"] == expected["zeros"],
            f"{counts['zeros']:,} zeros in {len(report['layers'])} linears, the report says "
            f"{expected['zeros']:,}",
        ),
        Check(
            "pattern",
            counts["violations"] == 0,
            f"{counts['violations']} groups break {pattern.name}",
        ),
        _check_answers(checkpoint, report["proof"]),
    ]


def _check_files(checkpoint: Checkpoint, digests: dict[str, str]) -> Check:
    """Compare the digests of the weight files with the report.

    A converted checkpoint has other files; only their headers were checked then.
    """
    folder, sound = checkpoint.folder, f"{len(checkpoint.entries)} tensors, headers are sound"
    present = {file.name for file in {entry.file for entry in checkpoint.file_entries.values()}}
    if digests.keys() != present:
        return Check("files", passed=True, detail=sound)
    for name, expected in digests.items():
        if file_sha256(folder / name) != expected:
            return Check("files", passed=False, detail=f"{name} differs from the file of the run")
    return Check("files", passed=True, detail=f"{sound}, digests as the report says")


def _check_units(checkpoint: Checkpoint, report: dict[str, Any]) -> Check:
    """Count the units of each group by the shapes in the files."""
    model = empty_model(checkpoint)
    stored_names(model, checkpoint)  # raises if shapes in the files contradict the config
    expected = {layer["name"]: len(layer["kept"]) for layer in report["layers"]}
    kinds = dict.fromkeys(layer["kind"] for layer in report["layers"])
    counts = {group.name: group.units for kind in kinds for group in unit_groups(model, kind)}
    wrong = [name for name in expected if counts.get(name) != expected[name]]
    detail = f"{sum(counts.values()):,} units in {len(counts)} places, as the report says"
    if wrong:
        detail = (
            f"{wrong[0]} has {counts.get(wrong[0], 'none')}, the report says {expected[wrong[0]]}"
        )
    return Check("units", not wrong, detail)


def _check_answers(checkpoint: Checkpoint, proof: dict[str, Any]) -> Check:
    """Compare outputs from a fresh process with the proof.

    Dense weights are loaded by stock transformers in a process without prunekit; compressed
    weights and blocks that differ in size need prunekit there.
    """
    who = "transformers with prunekit" if _needs_prunekit(checkpoint) else "stock transformers"
    if proof["device"] != "cpu" and not torch.cuda.is_available():
        detail = f"recorded on {proof['device']}, which is not available; nothing was compared"
        return Check("answers", passed=False, detail=detail)
    dtype = getattr(torch, proof["dtype"])
    count = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    with TemporaryDirectory(prefix="prunekit-") as offload:
        device_map = device_map_options(
            count * dtype.itemsize, torch.device(proof["device"]), offload
        )
        arguments = str(checkpoint.folder.absolute()), json.dumps(proof), json.dumps(device_map)
        completed = subprocess.run(
            [*_interpreter_command(checkpoint), *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    if completed.returncode:
        last = completed.stderr.strip().splitlines()[-1:] or ["no message"]
        return Check("answers", passed=False, detail=f"{who} cannot open it: {last[0]}")
    outputs = torch.tensor(json.loads(completed.stdout))
    expected = torch.tensor(proof["answers"])
    scale = float(expected.abs().max())
    allowed = scale * 32 * torch.finfo(dtype).eps
    difference = float((sample_outputs(outputs) - expected).abs().max())
    detail = (
        f"{who} answers within {difference:.2g} of the recorded outputs (allowed "
        f"{allowed:.2g}, largest output {scale:.3g})"
    )
    return Check("answers", difference <= allowed, detail)


def _needs_prunekit(checkpoint: Checkpoint) -> bool:
    """Return whether stock transformers alone cannot open the checkpoint."""
    return bool(checkpoint.compressed) or KEPT_UNITS_KEY in checkpoint.config


def _interpreter_command(checkpoint: Checkpoint) -> list[str]:
    if not _needs_prunekit(checkpoint):
        return [
            sys.executable,
            "-I",
            "-c",
            _LOAD_SCRIPT + _WITHOUT_PRUNEKIT_SCRIPT + _ANSWER_SCRIPT,
        ]
    # An isolated Python does not see an editable install or PYTHONPATH: name both folders.
    folders = {str(Path(__file__).parents[2]), str(Path(prunekit_kernels.__path__[0]).parent)}
    import_prunekit = f"import sys; sys.path[:0] = {sorted(folders)!r}\nimport prunekit\n"
    return [sys.executable, "-I", "-c", import_prunekit + _LOAD_SCRIPT + _ANSWER_SCRIPT]


_LOAD_SCRIPT = """
import json, sys, torch, transformers
folder, (proof, device_map) = sys.argv[1], map(json.loads, sys.argv[2:])
if device_map:  # JSON made the GPU numbers strings
    budgets = device_map["max_memory"].items()
    device_map["max_memory"] = {int(k) if k.isdigit() else k: size for k, size in budgets}
config = transformers.AutoConfig.from_pretrained(folder)
model_class = getattr(transformers, (config.architectures or ["AutoModel"])[0])
dtype = getattr(torch, proof["dtype"])
options = {"dtype": dtype, "output_loading_info": True, **device_map}
model, notes = model_class.from_pretrained(folder, **options)
assert not notes["missing_keys"], f"weights are missing: {sorted(notes['missing_keys'])[:3]}"
"""
_WITHOUT_PRUNEKIT_SCRIPT = """
assert "prunekit" not in sys.modules
"""
_ANSWER_SCRIPT = """
ids = torch.tensor(proof["ids"], device=proof["device"])
inputs = {"input_ids": ids}
if config.is_encoder_decoder:
    inputs["decoder_input_ids"] = ids
with torch.inference_mode():
    model = model if device_map else model.to(proof["device"])
    answers = model.eval()(**inputs)[0]
print(json.dumps(answers.float().cpu().tolist()))
"""


def _outputs_first(checkpoint: Checkpoint, layer: dict[str, Any]) -> Tensor:
    tensor = checkpoint.read([layer["tensor"]])[layer["tensor"]]
    return tensor.T if layer["transposed"] else tensor
