"""Token ids as callers pass them, checked before a model sees them.

Shapes: N samples, T tokens.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.data.samples import IGNORED
from prunekit.errors import ConfigError


def token_ids(data: object, model: PreTrainedModel, name: str = "tokens") -> Int[Tensor, "N T"]:
    """Return token ids as an int64 tensor.

    Args:
        data: A tensor, an array, or lists of equal lengths, with whole numbers [N, T].
        model: The model that reads them.
        name: Name of the argument, for messages.

    Raises:
        ConfigError: The data is something else, empty, or has an id that the model lacks.
    """
    ids = _as_tensor(data, name)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        kind = str(ids.dtype).removeprefix("torch.")
        raise ConfigError(f"{name}: token ids are whole numbers, not {kind}.")
    if ids.ndim != 2 or not ids.numel():
        raise ConfigError(
            f"{name}: token ids have the shape [samples, tokens], each at least 1, not "
            f"{[*ids.shape]}. Of a single sample: [ids]."
        )
    known, least = _vocabulary_size(model), IGNORED if name == "labels" else 0
    strange = ids[(ids >= known) | ((ids < 0) & (ids != least))]
    if len(strange):
        raise ConfigError(
            f"{name}: there is no token {int(strange[0])}; {type(model).__name__} knows 0 to "
            f"{known - 1}. Were they made with another tokenizer?"
        )
    _check_length(ids, model, name)
    return ids.long()


def to_batch(given: object, model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a batch with checked tensors on the device of the model.

    Raises:
        ConfigError: It is no mapping of names to tensors, or they do not fit each other.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"data: a batch of type {type(given).__name__} is no mapping, such as "
            '{"input_ids": tokens}. Pass tokens [N, T] or a list of batches.'
        )
    batch = {}
    for name, value in given.items():
        read = token_ids if name in {"input_ids", "decoder_input_ids"} else _other_input
        batch[name] = read(value, model, name).to(model.device)
    sizes = {name: len(value) for name, value in batch.items() if value.ndim}
    if len(set(sizes.values())) > 1:
        raise ConfigError(f"data: the parts of a batch have unlike numbers of samples: {sizes}.")
    mask = batch.get("attention_mask")
    if mask is not None and "input_ids" in batch and mask.shape != batch["input_ids"].shape:
        raise ConfigError(
            f"data: attention_mask has the shape {[*mask.shape]}, input_ids "
            f"{[*batch['input_ids'].shape]}."
        )
    return batch


def _other_input(value: object, model: PreTrainedModel, name: str) -> Tensor:
    # Labels of a classifier are no tokens.
    predicts = model.get_output_embeddings() is not None
    tensor = _as_tensor(value, name)
    if name == "labels" and predicts and tensor.ndim == 2:
        return token_ids(tensor, model, name)
    return tensor


def _as_tensor(data: object, name: str) -> Tensor:
    try:
        if isinstance(data, list | tuple) and data and hasattr(data[0], "shape"):
            data = torch.stack([torch.as_tensor(each) for each in data])
        tensor = torch.as_tensor(data)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ConfigError(
            f"{name}: a value of type {type(data).__name__} is no tensor, array or list of lists "
            "of equal lengths, of whole numbers."
        ) from None
    if tensor.is_meta:
        raise ConfigError(f"{name}: the tensor is on the meta device and has no values.")
    return tensor


def _vocabulary_size(model: PreTrainedModel) -> int:
    embedding = model.get_input_embeddings()
    rows = getattr(getattr(embedding, "weight", None), "shape", [0])[0]
    return rows or model.config.get_text_config().vocab_size


def _check_length(ids: Tensor, model: PreTrainedModel, name: str) -> None:
    """Refuse samples longer than a table of learned positions."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    learned = any(
        isinstance(module, nn.Embedding) and path.rpartition(".")[2] in POSITION_TABLES
        for path, module in model.named_modules()
    )
    if learned and longest and ids.shape[1] > longest:
        raise ConfigError(
            f"{name}: samples of {ids.shape[1]} tokens; {type(model).__name__} knows {longest} "
            "positions."
        )


POSITION_TABLES = frozenset({"wpe", "position_embeddings", "embed_positions"})
"""Names of tables of learned positions: GPT-2, BERT and RoBERTa, OPT."""
