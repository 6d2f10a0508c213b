"""Formats of real pruned models: bytes, memory, and readers.

    python -m bench.jobs.formats [--models NAME …]

Each model is pruned to 2:4 by magnitude, which is quick, and written in every format. Each is then
opened in a new process with prunekit and in one without it. Nothing is timed, so the machine need
not be idle.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench.harness.measure import RESULTS, describe
from bench.jobs.end_to_end import CACHE, SHARED
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.cli.demo import smollm2
from prunekit.config.load import load_config
from prunekit.inference.convert import convert
from prunekit.runs.sparsify.planner import plan
from prunekit.runs.sparsify.run import run

CONFIG = """
[model]
path = "{model}"
[prune]
method = "magnitude"
pattern = "2:4"
[output]
path = "{out}"
"""

OPEN = """
import json, sys
{first}
import torch, transformers
from safetensors.torch import save_file
model = transformers.AutoModelForCausalLM.from_pretrained(
    {folder!r}, dtype=torch.{dtype}, trust_remote_code=False
)
tensors = [*model.parameters(), *model.buffers()]
held = {{t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}}
with torch.no_grad():
    ids = (torch.arange(64) * 7919 % model.config.vocab_size)[None]
    logits = model(ids).logits
    new = model.generate(ids[:, :4], max_new_tokens=16, do_sample=False, pad_token_id=0)
save_file({{"logits": logits.double(), "new": new}}, {out!r})
print(json.dumps(sum(held.values())))
"""


def opened(folder: Path, dtype: str, *, knows: bool) -> dict[str, Any]:
    """Open a folder in a new process; return its output or error."""
    with tempfile.TemporaryDirectory() as name:
        out = str(Path(name) / "answers.safetensors")
        # None in `sys.modules` acts as if the package were not installed.
        first = "import prunekit" if knows else 'sys.modules["prunekit"] = None'
        script = OPEN.format(first=first, folder=str(folder), dtype=dtype, out=out)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        if done.returncode:
            return {"refused": done.stderr.strip().splitlines()[-1]}
        return {"resident_bytes": int(done.stdout.split()[-1]), **load_file(out)}


def measure(name: str, model: Path) -> list[dict[str, Any]]:
    """Return a row for each format of one model."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "job.toml").write_text(CONFIG.format(model=model, out=folder / "dense"))
        for _ in run(plan(load_config(folder / "job.toml"))):
            pass
        pruned = {
            f"{layer['tensor']}"
            for layer in json.loads((folder / "dense/report.json").read_text())["layers"]
        }
        exact = opened(folder / "dense", "float64", knows=True)
        plain = opened(folder / "dense", "float32", knows=True)
        allowed = float((plain["logits"] - exact["logits"]).abs().max())
        rows = []
        for kind in ("dense", "2:4", "bitmask"):
            if kind != "dense":
                convert(folder / "dense", folder / kind, kind)
            rows.append({"model": name, "format": kind, **_sizes(folder / kind, pruned)})
            found = opened(folder / kind, "float32", knows=True)
            rows[-1] |= {
                "float32_resident_bytes": found["resident_bytes"],
                "difference_from_float64": float((found["logits"] - exact["logits"]).abs().max()),
                "difference_of_dense_from_float64": allowed,
                "same_tokens": torch.equal(found["new"], plain["new"]),
                "stored_resident_bytes": opened(folder / kind, "bfloat16", knows=True)[
                    "resident_bytes"
                ],
                "without_prunekit": opened(folder / kind, "float32", knows=False).get(
                    "refused", "opens"
                ),
            }
            print(_line(rows[-1]), flush=True)
        return rows


def _sizes(folder: Path, pruned: set[str]) -> dict[str, int]:
    checkpoint = open_checkpoint(folder)
    linears = 0
    for name in pruned:
        packed = checkpoint.compressed.get(name)
        parts = packed.parts.values() if packed else [name]
        linears += sum(checkpoint.file_entries[part].nbytes for part in parts)
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"file_bytes": files, "pruned_linear_bytes": linears}


COLUMNS = (
    "model",
    "format",
    "files",
    "pruned linears",
    "in memory, bfloat16",
    "largest difference of a logit from float64 (of dense float32)",
    "without prunekit",
)


def _line(row: dict[str, Any]) -> str:
    cells = (
        row["model"],
        row["format"],
        f"{row['file_bytes'] / 1e6:.1f} MB",
        f"{row['pruned_linear_bytes'] / 1e6:.2f} MB",
        f"{row['stored_resident_bytes'] / 1e6:.1f} MB",
        f"{row['difference_from_float64']:.1e} ({row['difference_of_dense_from_float64']:.1e}), "
        f"{'same' if row['same_tokens'] else 'OTHER'} tokens",
        row["without_prunekit"].partition(", thus")[0],
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure and rewrite ``bench/results/<machine>/formats.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", help="only these")
    options = parser.parse_args()
    models = {"SmolLM2-135M": lambda: smollm2(CACHE / "smollm2-135m-instruct")}
    if SHARED.is_dir():
        models["stories15M"] = lambda: SHARED / "models/stories15M"
    else:
        print(f"{SHARED} is absent: stories15M is left out.")
    rows = [
        row
        for name, model in models.items()
        if not options.models or name in options.models
        for row in measure(name, model())
    ]
    machine = describe(torch.device("cpu"))
    folder = RESULTS / machine["name"]
    folder.mkdir(parents=True, exist_ok=True)
    header = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    found = {"machine": machine, "rows": rows}
    (folder / "formats.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "formats.md").write_text("\n".join([*header, *map(_line, rows)]) + "\n")


if __name__ == "__main__":
    main()
