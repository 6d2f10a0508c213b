"""The command ``prunekit quantize``: a run that rounds the weights of a checkpoint."""

import json
import shlex
from pathlib import Path
from typing import Any, Literal

from prunekit.cli.app import Switch, app
from prunekit.cli.run import run_here, stopped_hint


@app.command
def quantize(  # noqa: PLR0913  independent options
    source: str,
    target: Path,
    /,
    *,
    scheme: Literal["int4", "int8", "fp8"],
    data: tuple[str, ...] = (),
    samples: int = 128,
    length: int = 512,
    device: str = "auto",
    resume: Switch = False,
    overwrite: Switch = False,
    quiet: Switch = False,
) -> int:
    """Round the weights of a checkpoint to few bits; zeros stay.

    vLLM and transformers open the result through the library compressed-tensors. "quantize" of
    [output] in a config does the same while a model is pruned, and knows the weights before.

    Args:
        source: A checkpoint folder, pruned or not, or an id on the hub.
        target: A new folder.
        scheme: int4 (a scale for each 128, 64 or 32 inputs), int8 or fp8 (one for each output).
        data: Text to calibrate on, as in [calibration]; may be repeated. With it each weight makes
            up for the rounding of those before it (mask-aware GPTQ); without it, to nearest.
        samples: Samples of that text.
        length: Tokens of each.
        device: cpu, cuda or cuda:0; auto: the GPU if there is one.
        resume: Continue a run that was stopped.
        overwrite: Replace the output of an earlier run.
        quiet: Show no progress.
    """
    from prunekit.config.load import load_config_text

    calibration = {"data": list(data), "samples": samples, "length": length} if data else None
    text = config_text(source, target, scheme, calibration, device)
    config = load_config_text(text, Path.cwd(), "prunekit quantize")
    given = ["prunekit", "quantize", source, str(target), "--scheme", scheme]
    given += [part for each in data for part in ("--data", each)]
    given += ["--samples", str(samples), "--length", str(length), "--device", device]

    def hint() -> str:
        return stopped_hint(target, shlex.join([*given, "--resume"]))

    return run_here(config, hint, resume=resume, overwrite=overwrite, quiet=quiet)


def config_text(
    source: str, target: Path, scheme: str, calibration: dict[str, Any] | None, device: str
) -> str:
    """Return the config of a run that prunes nothing and quantizes.

    Args:
        source: The checkpoint.
        target: The output folder.
        scheme: "int4", "int8" or "fp8".
        calibration: The table ``[calibration]``, if there is one.
        device: The device of the model.
    """
    tables = {
        "model": {"path": source, "device": device},
        "calibration": calibration,
        "prune": {"method": "magnitude", "pattern": "unstructured", "sparsity": 0.0},
        "output": {"path": str(target), "quantize": scheme},
    }
    lines = []
    for name, keys in tables.items():
        if keys:
            # Texts, numbers and lists of texts are written in TOML as in JSON.
            values = (f"{key} = {json.dumps(keys[key], ensure_ascii=False)}" for key in keys)
            lines += [f"[{name}]", *values]
    return "\n".join(lines) + "\n"
