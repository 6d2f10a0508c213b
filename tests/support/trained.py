"""Plans of runs that prune weights and train the model, on tiny checkpoints."""

from pathlib import Path
from typing import Any

from prunekit.config.run_config import Config
from prunekit.runs.jobs import plan
from prunekit.runs.trained.plan import TrainedPlan

TRAIN = {"steps": 8, "rate": 1e-2, "batch": 4, "held_out": 4, "every": 4}


def planned(
    folder: Path, output: Path, prune: dict[str, Any], /, **sections: dict[str, Any]
) -> TrainedPlan:
    """Return the plan of a training of eight steps.

    Args:
        folder: Checkpoint with a ``text.txt``.
        output: Output folder of the run.
        prune: The table [prune].
        sections: Keys of other tables.
    """
    values = {
        "model": {"path": str(folder), "device": "cpu"},
        "calibration": {"data": str(folder / "text.txt"), "samples": 12, "length": 12},
        "prune": {"method": "magnitude", "pattern": "unstructured"} | prune,
        "train": dict(TRAIN),
        "output": {"path": str(output)},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    made = plan(Config.model_validate(values))
    assert isinstance(made, TrainedPlan)
    return made
