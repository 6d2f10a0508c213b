"""Record of the heads and neurons kept by unequal layers.

Where a stock config cannot describe the shapes of a pruned model, its config holds the kept units
of each group under ``KEPT_UNITS_KEY``, and a ``quantization_config`` that makes transformers load
the folder through prunekit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from prunekit.checkpoint.compressed import DENSE_STORAGE, KEPT_UNITS_KEY

KeptUnits = Mapping[str, int | Sequence[int]]
"""Kept units by group name: their number, or the heads themselves under a position bias."""


def read_record(model: PreTrainedModel) -> dict[str, int | list[int]]:
    """Return the record of a model; empty for stock shapes."""
    return getattr(model.config, KEPT_UNITS_KEY, {})


def update_record(model: PreTrainedModel, removed: Sequence[str], new: KeptUnits) -> None:
    """Replace the record of some groups; drop an empty record.

    Args:
        model: The model whose config is changed.
        removed: Names of the groups whose old record is invalid.
        new: Their new record; empty if the config entries describe them.
    """
    before = read_record(model)
    record = {name: units for name, units in before.items() if name not in removed} | dict(new)
    if record:
        setattr(model.config, KEPT_UNITS_KEY, record)
        require_prunekit(model)
    elif before:
        delattr(model.config, KEPT_UNITS_KEY)
        if not _storage(model)["linears"]:
            delattr(model.config, "quantization_config")


def require_prunekit(model: PreTrainedModel) -> None:
    """Make transformers load a saved copy of this model through prunekit."""
    if not hasattr(model.config, "quantization_config"):
        model.config.quantization_config = dict(DENSE_STORAGE)


def _storage(model: PreTrainedModel) -> dict[str, Any]:
    """Return how the config says that weights are stored."""
    storage = model.config.quantization_config
    return storage if isinstance(storage, dict) else storage.to_dict()
