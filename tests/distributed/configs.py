"""Write configs of small runs."""

import json
from pathlib import Path
from typing import Any

RUN = """
from prunekit.runs import jobs
from prunekit.models.sequential import pipeline
from prunekit.config.load import load_config
from prunekit.distributed.join import join

# One rank and two then have the same batches and sum in the same order: ADMM may choose another
# mask after a small difference.
pipeline.BATCH_TOKENS["cpu"] = 4 * 24
with join("cpu") as ranks:
    for path in arguments:
        for record in jobs.run(jobs.plan(load_config(path), ranks)):
            pass
"""
"""Script that carries out the runs of configs, one after the other, on all ranks."""


def write(file: Path, model: Path, output: Path, **sections: Any) -> Path:
    """Write a config of a small run.

    Each of ``sections`` updates a default table, ``prune`` replaces it, None leaves it out.
    """
    text = str(model / "text.txt")
    values: dict[str, Any] = {
        "model": {"path": str(model), "device": "cpu"},
        "calibration": {"data": text, "samples": 8, "length": 24},
        "prune": {"method": "sparsegpt", "pattern": "2:4"},
        "evaluate": {"data": text, "length": 12, "windows": 3},
        "output": {"path": str(output)},
    }
    for name, section in sections.items():
        values[name] = section if name == "prune" else section and values.get(name, {}) | section
    lines = []
    for name, section in values.items():
        if section is None:
            continue
        lines.append(f"[{name}]")
        # Strings, numbers and booleans of TOML are those of JSON.
        lines += [f"{key} = {json.dumps(value)}" for key, value in section.items()]
    file.write_text("\n".join(lines) + "\n")
    return file
