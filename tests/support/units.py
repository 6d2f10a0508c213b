"""Input samples for tests of units, valid for every tiny model."""

from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

import prunekit
from prunekit.errors import CheckpointError
from prunekit.models.attention_hook import check_observable
from prunekit.models.units.heads_neurons import linear_groups
from prunekit.models.units.kinds import KINDS, Kind
from prunekit.structured.unit_gates import Gates
from tests.support.architectures import tiny

DENSE_KINDS = tuple(kind for kind in KINDS if kind != "experts")
"""Kinds of units of models without experts."""
PADDED = 6  # tokens of the first sample; the second has the full length
LENGTH = 9
EQUAL_DEPTH = {"t5": {"num_decoder_layers": 2}}
"""Equal depths, since transformers sizes a decoder's cache by its encoder's depth."""


def randomized_model(model_type: str, **overrides) -> PreTrainedModel:
    """Return a tiny model with randomized biases and norms."""
    model = tiny(model_type, **overrides)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(3)  # initial values are so small that attention is almost uniform
    return model


def skip_without_attention_interface(model: PreTrainedModel) -> None:
    """Skip the test if the model bypasses transformers' attention interface.

    Versions of transformers differ in which families do.
    """
    try:
        check_observable(site.module for site in linear_groups(model, "heads"))
    except CheckpointError as error:
        pytest.skip(str(error))


def batch(model: PreTrainedModel, *, left: bool = False) -> dict[str, torch.Tensor]:
    """Return a batch of two samples, one of them padded."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 96, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    padding = slice(0, LENGTH - PADDED) if left else slice(PADDED, None)
    mask[0, padding] = 0
    found = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        labels = torch.randint(3, 96, (2, 5), generator=generator)
        labels[1, 3:] = -100
        found["labels"] = labels
    elif type(model).__name__.endswith("MaskedLM"):
        found["labels"] = ids.masked_fill(mask == 0, -100)
    return found


@torch.no_grad()
def valid_logits(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of non-padding tokens."""
    logits = model(**given).logits
    return logits if "labels" in given else logits[given["attention_mask"].bool()]


def close_whole(model: PreTrainedModel, kind: Kind, numbers: Sequence[int]) -> Gates:
    """Return gates, all closed in the groups of some numbers and open in the others."""
    gates = prunekit.heads(model) if kind == "heads" else prunekit.neurons(model)
    closed = {gates.groups[number].name for number in numbers}
    gates.close({name: mask & (name not in closed) for name, mask in gates.keep.items()})
    return gates


def random_kept(model: PreTrainedModel, kind: Kind, *, uniform: bool) -> dict[str, list[int]]:
    """Return about half of each group's units; equally many if ``uniform``."""
    kept = {}
    for index, site in enumerate(linear_groups(model, kind)):
        # T5's blocks share a bias, so a stock model keeps the same heads in all blocks of a stack.
        generator = torch.Generator().manual_seed(0 if uniform else index)
        count = max(1, site.units // 2 + (0 if uniform else (0, 1, 1)[index % 3]))
        kept[site.name] = torch.randperm(site.units, generator=generator)[:count].sort()[0].tolist()
    return kept
