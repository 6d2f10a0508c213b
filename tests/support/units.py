"""Samples for tests of heads and neurons: what every tiny model can be called with."""

import pytest
import torch
from transformers import PreTrainedModel

from prunekit.errors import CheckpointError
from prunekit.models.attention_hook import check_observable
from prunekit.models.units.heads_neurons import linear_groups
from prunekit.models.units.kinds import Kind
from tests.support.architectures import tiny

PADDED = 6  # tokens of the first sample; the second fills its nine
LENGTH = 9
EQUAL_DEPTH = {"t5": {"num_decoder_layers": 2}}
"""transformers makes the cache of a decoder as deep as its encoder."""


def randomized_model(model_type: str, **overrides) -> PreTrainedModel:
    """Return a tiny model whose biases and norms are not what they are initialised with."""
    model = tiny(model_type, **overrides)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(3)  # initialised so small that attention is all but uniform
    return model


def skip_without_attention_interface(model: PreTrainedModel) -> None:
    """Skip the test where this transformers computes attention by itself, as 5.11 does in T5."""
    try:
        check_observable(site.module for site in linear_groups(model, "heads"))
    except CheckpointError as error:
        pytest.skip(str(error))


def batch(model: PreTrainedModel, *, left: bool = False) -> dict[str, torch.Tensor]:
    """Return two samples, one of them padded."""
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
    """Return the logits of tokens that are no padding."""
    logits = model(**given).logits
    return logits if "labels" in given else logits[given["attention_mask"].bool()]


def random_kept(model: PreTrainedModel, kind: Kind, *, uniform: bool) -> dict[str, list[int]]:
    """Return about half of the units of each group; as many in each if ``uniform``."""
    kept = {}
    for index, site in enumerate(linear_groups(model, kind)):
        # T5's stacks share a bias, so that a stock model keeps the same heads in all blocks.
        generator = torch.Generator().manual_seed(0 if uniform else index)
        count = max(1, site.units // 2 + (0 if uniform else (0, 1, 1)[index % 3]))
        kept[site.name] = torch.randperm(site.units, generator=generator)[:count].sort()[0].tolist()
    return kept
