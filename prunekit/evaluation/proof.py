"""Proof of a run: outputs that transformers has to reproduce.

A run records outputs that its own block-by-block evaluation computes, and compares them with those
of transformers in the same process; ``prunekit verify`` does so in a fresh process.

Shapes: T tokens, N sampled outputs.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import prunekit_kernels
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prunekit.checkpoint.compressed import KEPT_UNITS_KEY
from prunekit.checkpoint.packed import LIBRARY, SCALE, library_is_installed
from prunekit.checkpoint.reader import Checkpoint
from prunekit.errors import CheckpointError, is_out_of_memory
from prunekit.evaluation.perplexity import Evaluator
from prunekit.models import stock
from prunekit.models.experts import Expert
from prunekit.models.memory import device_map_options

PROOF_TOKENS = 16
PROOF_KEYS = ("ids", "dtype", "device")
"""Entries of a proof that define the computation."""
LARGEST_IN_MEMORY = 1 << 27
"""Bytes of the largest model that a run loads whole for its proof, not block by block."""
Answer = Callable[[dict[str, Any], dict[str, Any]], Float[Tensor, " N"]]
"""Returns the outputs for the entries of a proof and options that place the model."""


@dataclass(frozen=True)
class Check:
    """Result of one check: its name, whether it passed, and details."""

    name: str
    passed: bool
    detail: str


def make_proof(checkpoint: Checkpoint, device: torch.device) -> dict[str, Any]:
    """Record outputs of the written model, which transformers has to reproduce.

    Without the library that opens quantized weights, outputs are recorded but not compared.

    Raises:
        CheckpointError: transformers cannot open the folder, or computes other outputs.
    """
    evaluator = Evaluator(checkpoint, device)
    ids = proof_ids(evaluator.model.config)
    proof = {
        "ids": ids.tolist(),
        "dtype": str(evaluator.weights.dtype).removeprefix("torch."),
        "device": device.type,
        "answers": stock.sample_outputs(evaluator.outputs(ids)).tolist(),
    }
    # transformers copies offloaded weights that it converts to another file: experts are converted.
    converted = any(isinstance(module, Expert) for module in evaluator.model.modules())
    limit = math.inf if converted else LARGEST_IN_MEMORY
    del evaluator
    if needed_library(checkpoint) is not None:
        return proof
    check = check_answers(checkpoint, proof, _here(checkpoint.folder), limit)
    if not check.passed:
        raise CheckpointError(
            f"{checkpoint.folder}: is written, but {check.detail}. Find the cause in config.json "
            "and the files that were copied from the model, and start the run again."
        )
    return proof


def check_recorded_answers(checkpoint: Checkpoint, proof: dict[str, Any]) -> Check:
    """Compare outputs that a fresh process computes with a proof.

    Dense weights are loaded in a process without prunekit; compressed weights and blocks that
    differ in size need prunekit there.
    """
    if proof["device"] != "cpu" and not torch.cuda.is_available():
        detail = f"recorded on {proof['device']}, which is not available; nothing was compared"
        return Check("answers", passed=False, detail=detail)
    return check_answers(checkpoint, proof, _in_fresh_process(checkpoint))


def check_answers(
    checkpoint: Checkpoint, proof: dict[str, Any], answer: Answer, limit: float = math.inf
) -> Check:
    """Compare the outputs of transformers with a proof.

    Args:
        checkpoint: The written model.
        proof: From :func:`make_proof`.
        answer: Opens the model with transformers and returns its outputs.
        limit: Bytes of main and of device memory that the model may take.
    """
    who = "transformers with prunekit" if _needs_prunekit(checkpoint) else "stock transformers"
    dtype, device = getattr(torch, proof["dtype"]), torch.device(proof["device"])
    count = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    with TemporaryDirectory(prefix="prunekit-") as offload:
        device_map = device_map_options(count * dtype.itemsize, device, offload, limit)
        try:
            found = answer({key: proof[key] for key in PROOF_KEYS}, device_map)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = error if isinstance(error, ChildError) else stock.describe(error)
            return Check("answers", passed=False, detail=f"{who} cannot open it: {reason}")
    expected = torch.tensor(proof["answers"])
    if found.shape != expected.shape:
        detail = f"{who} gives {len(found)} outputs, the report has {len(expected)}"
        return Check("answers", passed=False, detail=detail)
    scale = float(found.abs().max())
    allowed = scale * 32 * torch.finfo(dtype).eps
    difference = float((found - expected).abs().max())
    detail = (
        f"{who} answers within {difference:.2g} of the recorded outputs (allowed "
        f"{allowed:.2g}, largest output {scale:.3g})"
    )
    return Check("answers", math.isfinite(scale) and difference <= allowed, detail)


def proof_ids(config: Any) -> Int[Tensor, "1 T"]:  # noqa: ANN401
    """Return fixed tokens, spread over the vocabulary, that fit every model."""
    config = config.get_text_config()
    length = min(PROOF_TOKENS, getattr(config, "max_position_embeddings", None) or PROOF_TOKENS)
    return (torch.arange(1, length + 1) * 7919 % config.vocab_size)[None]


def needed_library(checkpoint: Checkpoint) -> str | None:
    """Return the library that transformers lacks here, or None."""
    uses = any(weight.scales.endswith(f".{SCALE}") for weight in checkpoint.quantized.values())
    return LIBRARY if uses and not library_is_installed() else None


class ChildError(RuntimeError):
    """The error of a fresh process that could not open the model."""


def _needs_prunekit(checkpoint: Checkpoint) -> bool:
    """Return whether stock transformers alone cannot open the checkpoint."""
    return bool(checkpoint.compressed) or KEPT_UNITS_KEY in checkpoint.config


def _here(folder: Path) -> Answer:
    """Return a function that opens the model in this process."""
    return lambda asked, device_map: stock.answers(folder, asked, device_map)


def _in_fresh_process(checkpoint: Checkpoint) -> Answer:
    """Return a function that opens the model in a fresh process."""

    def answer(asked: dict[str, Any], device_map: dict[str, Any]) -> Tensor:
        needed = _needs_prunekit(checkpoint)
        with TemporaryDirectory(prefix="prunekit-") as scratch:
            result = Path(scratch, "answers.json")
            request = {
                "folder": str(checkpoint.folder.absolute()),
                "asked": asked,
                "device_map": device_map,
                "prunekit": needed,
                "result": str(result),
            }
            done = subprocess.run(
                [sys.executable, "-P", stock.__file__, json.dumps(request)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                cwd="/",
                env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": _module_path(needed)},
            )
            if not result.is_file():
                said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
                raise ChildError(said[0] if said else f"it ended with exit code {done.returncode}")
            outcome = json.loads(result.read_text(encoding="utf-8"))
        if "error" in outcome:
            raise ChildError(outcome["error"])
        return torch.tensor(outcome["answers"])

    return answer


def _module_path(with_prunekit: bool) -> str:  # noqa: FBT001
    """Return the folders in which a fresh process looks for modules.

    They are those of this process, as set by virtual environment, user site and PYTHONPATH, without
    the working directory and the folder of the script: they may belong to the checkpoint.
    """
    unsafe = {Path.cwd(), Path(sys.argv[0]).absolute().parent}
    paths = [path for path in sys.path if Path(path).is_absolute() and Path(path) not in unsafe]
    if with_prunekit:
        paths[:0] = [str(Path(__file__).parents[2]), str(Path(prunekit_kernels.__path__[0]).parent)]
    return os.pathsep.join(paths)
