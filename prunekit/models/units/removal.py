"""Removal of units, and its replay when a folder is opened.

Where all blocks keep the same number of units, the config can state it and the model is a stock
one. Otherwise the config records the kept units, and transformers needs prunekit to open the
folder; see :mod:`prunekit.models.units.kept_record`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel

from prunekit.architectures.adapters import without_adapters
from prunekit.checkpoint.compressed import KEPT_UNITS_KEY
from prunekit.errors import CheckpointError
from prunekit.models import stock
from prunekit.models.adapters import update_adapter_features
from prunekit.models.experts import unfuse
from prunekit.models.units.base import Kept, UnitGroup
from prunekit.models.units.heads_neurons import declared_linear_groups
from prunekit.models.units.kept_record import read_record, require_prunekit
from prunekit.models.units.position_bias import select_position_biases


def apply_removal(
    model: PreTrainedModel,
    groups: Sequence[UnitGroup],
    kept: Kept,
    entries: Mapping[str, Any] | None,
) -> None:
    """Remove all but the kept units of one kind, in place.

    Args:
        model: The model that is changed.
        groups: All groups of the kind, as they are now.
        kept: Kept units of each group.
        entries: Result of :func:`prunekit.models.units.stock_config.stock_entries`. None (heads
            and neurons only) records the kept units in the config instead.
    """
    with without_adapters(model):
        type(groups[0]).cut(model, groups, kept, entries)
    update_adapter_features(model)


def restore(model: PreTrainedModel) -> None:
    """Apply the record of kept units to a newly built model."""
    record = read_record(model)
    if not record:
        return
    require_prunekit(model)
    with torch.device("cpu"):  # transformers builds models on meta, where indices have no values
        both = declared_linear_groups(model, "heads"), declared_linear_groups(model, "neurons")
        for groups in both:
            for group in groups:
                units = record.get(group.name, group.units)
                group.narrow(_recorded_units(group, units))
            select_position_biases(model, groups)


def _recorded_units(group: UnitGroup, units: int | list[int]) -> Sequence[int]:
    """Return the units of a group that a record names.

    Args:
        group: The units of the whole model.
        units: The record of the group.

    Raises:
        CheckpointError: They are no units of the group.
    """
    keep = range(units) if isinstance(units, int) else units
    countable = len(keep) == units if isinstance(keep, range) else isinstance(keep, list)
    if not countable or not all(type(each) is int and 0 <= each < group.units for each in keep):
        raise CheckpointError(
            f"config.json: {KEPT_UNITS_KEY} has {units!r} for {group.name}, and that has "
            f"{group.units} {group.kind}. It belongs to another model."
        )
    return keep


def described_model(model: PreTrainedModel, config: Mapping[str, Any]) -> PreTrainedModel:
    """Build the model that a ``config.json`` describes, without weights.

    Fused experts are linears, as in :func:`prunekit.models.empty_model.empty_model`.

    Args:
        model: A model of the same family; only its class is used.
        config: Content of the ``config.json``, with the record of kept units.
    """
    # transformers reads more from a file than from its content, such as infinite numbers.
    with TemporaryDirectory(prefix="prunekit-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        read = stock.read_config(Path(folder))
    with init_empty_weights(include_buffers=False):
        described = type(model)._from_config(read).eval()
        restore(described)
    unfuse(described)
    return described


def count_parameters(model: PreTrainedModel) -> int:
    """Return the number of parameters of a model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
