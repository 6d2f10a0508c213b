"""Facts that must be the same on all ranks.

They are compared before a plan is made, and before it is carried out.
"""

import hashlib
import json
import platform
from typing import Any

from prunekit.config.run_config import Config, StructuredConfig, SweepConfig
from prunekit.reports import environment
from prunekit.runs.plan_base import PlanBase


def config_facts(config: Config | StructuredConfig | SweepConfig) -> dict[str, Any]:
    """Return kind and config of a job, and software versions."""
    job = {"job": type(config).__name__, "versions": versions()}
    return job if isinstance(config, SweepConfig) else job | config.dump()


def versions() -> dict[str, str]:
    """Return the versions of the software that decides a result."""
    from prunekit._version import __version__

    major, minor, _ = platform.python_version_tuple()
    return {"prunekit": __version__, "python": f"{major}.{minor}", **environment.installed()}


def plan_facts(plan: PlanBase) -> dict[str, Any]:
    """Return the facts that each rank has determined by itself.

    They describe its device and the model without its weights.
    """
    files: dict[str, list[Any]] = {}
    for name, entry in sorted(plan.checkpoint.file_entries.items()):
        tensor = [name, str(entry.dtype), entry.shape, entry.start]
        files.setdefault(entry.file.name, []).append(tensor)
    return {
        "device": plan.device.type,
        # Both follow from the free memory where the config leaves them open.
        "sharded training": plan.sharded,
        "train.adapter": str(plan.config.train and plan.config.train.adapter),
        "dtype": str(plan.dtype),
        "lengths": plan.lengths,
        "config.json": plan.checkpoint.config,
        "tensors": {file: _digest(tensors) for file, tensors in files.items()},
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
