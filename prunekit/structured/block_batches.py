"""Batches without padding, on which a model is run block by block.

Statistics of a linear's inputs then hold no padding, and blocks need no masks.

Shapes: N samples, B samples of a batch, T tokens.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.data.samples import IGNORED, Sample, Samples
from prunekit.errors import ConfigError
from prunekit.models.sequential.pipeline import batch_tokens, split_batches
from prunekit.structured.batches import Batch, Data, to_batches, valid_tokens
from prunekit.structured.token_ids import token_ids

OF_THE_DECODER = frozenset({"labels", "decoder_input_ids"})
READ = frozenset({"input_ids", "token_type_ids"})
MASKS = frozenset({"attention_mask", "decoder_attention_mask"})


def block_batches(data: Data, model: PreTrainedModel) -> list[Batch]:
    """Return data as batches of samples of one length.

    Args:
        data: Token ids [N, T], or batches, of which padding is left out.
        model: The model that reads them.

    Raises:
        ConfigError: The data does not fit the model, a batch has an input that blocks do not read,
            or a mask with gaps.
    """
    is_batches = isinstance(data, Sequence) and bool(data) and isinstance(data[0], Mapping)
    if not is_batches:
        ids = token_ids(data, model)
        return [{"input_ids": part} for part in split_batches(ids, model.device)]
    rows = [row for batch in to_batches(data, model) for row in _rows(batch, model)]
    # In the order of lengths: batches that were made here before are made again alike.
    samples = Samples(rows, 0, "", seed=None)
    batches = samples.even_batches(batch_tokens(model.device))
    return [to_device(batch, model.device) for batch in batches]


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> Batch:
    """Return a batch on a device."""
    return {name: value.to(device) for name, value in batch.items()}


def _rows(batch: Batch, model: PreTrainedModel) -> list[Sample]:
    """Return the samples of a batch without their padding."""
    unknown = batch.keys() - READ - MASKS - OF_THE_DECODER
    if unknown:
        raise ConfigError(
            f"data: blocks are run on {', '.join(sorted(READ | MASKS))}, and for a decoder on "
            f"{' or '.join(sorted(OF_THE_DECODER))}; not on {', '.join(sorted(unknown))}."
        )
    names = READ & batch.keys()
    parts = [(name, valid_tokens(batch, decodes=False)) for name in sorted(names)]
    if model.config.is_encoder_decoder:  # labels of other models are no inputs
        name = "decoder_input_ids" if "decoder_input_ids" in batch else "labels"
        parts.append((name, valid_tokens(batch, decodes=True)))
    return [
        {name: _valid(batch[name], mask, number) for name, mask in parts}
        for number in range(len(batch["input_ids"]))
    ]


def _valid(values: Tensor, mask: Tensor | None, number: int) -> list[int]:
    """Return the values of one sample that are no padding."""
    if mask is None:
        return values[number].tolist()
    places = mask[number].nonzero().flatten()
    if not len(places) or int(places[-1] - places[0]) + 1 != len(places):
        found = "masks all of" if not len(places) else "has gaps in"
        raise ConfigError(
            f"data: an attention mask, or labels of {IGNORED}, {found} sample {number} of a batch. "
            "Blocks are run on samples without padding: mask only their ends."
        )
    return values[number, places].tolist()
