"""Batches of samples, and the loss of each sample.

Shapes: N samples, B samples of a batch, T tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from prunekit.architectures.adapters import bare_model
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError
from prunekit.models.causal import predicts_next_token
from prunekit.structured.token_ids import IGNORED, to_batch, token_ids

Batch = dict[str, Tensor]
"""Keyword arguments of a model call: ``input_ids``, ``attention_mask``, ``labels`` …"""

Data = Int[Tensor, "N T"] | Sequence[Mapping[str, Tensor]]
"""Token ids, or ready batches."""

BATCH_SAMPLES = 8
"""Samples per batch when token ids are split into batches."""


def to_batches(data: Data | None, model: PreTrainedModel) -> list[Batch]:
    """Return data as batches on the device of the model.

    Raises:
        ConfigError: There is no data, it does not fit the model, or a batch lacks an input that the
            model needs.
    """
    if data is None:
        raise ConfigError("data: there is none; pass tokens [N, T] or a list of batches.")
    found = [to_batch(batch, model) for batch in split_batches(data, model, BATCH_SAMPLES)]
    required = [{"input_ids"}]
    if model.config.is_encoder_decoder:
        required.append({"labels", "decoder_input_ids"})
    for batch in found:
        for names in required:
            if not names & batch.keys():
                raise ConfigError(
                    f"data: {type(model).__name__} reads {' or '.join(sorted(names))}, and a batch "
                    f"has only {', '.join(sorted(batch))}."
                )
    return found


def split_batches(data: object, model: PreTrainedModel, size: int) -> Sequence[Mapping[str, Any]]:
    """Return data as batches; ready batches are not changed.

    Args:
        data: Token ids, or ready batches.
        model: The model that reads them.
        size: Samples of a batch of token ids.

    Raises:
        ConfigError: There are no token ids and no batches.
    """
    if isinstance(data, Iterable) and not isinstance(data, Tensor | Mapping | str):
        data = [*data] if isinstance(data, Sequence | Iterator) else data
        if isinstance(data, list) and data and isinstance(data[0], Mapping):
            return data
    return [{"input_ids": part} for part in token_ids(data, model, "data").split(size)]


def valid_tokens(batch: Batch, *, decodes: bool) -> Bool[Tensor, "B T"] | None:
    """Return the mask of non-padding tokens; None if all are valid.

    ``decodes`` asks for the tokens of a decoder with cross-attention: valid by its own mask, else
    where the ``labels``, from which its tokens are made, are not ignored.
    """
    if not decodes:
        mask = batch.get("attention_mask")
        return None if mask is None else mask.bool()
    if "decoder_attention_mask" in batch:
        return batch["decoder_attention_mask"].bool()
    return batch["labels"] != IGNORED if "labels" in batch else None


def losses(model: PreTrainedModel, batch: Batch) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Return the summed loss of each sample, and its number of predictions.

    Without ``labels`` a causal language model predicts each token after the first from those before
    it, padding excepted; other models need ``labels``.

    Raises:
        ConfigError: Labels are missing, or do not fit the shape of the logits.
    """
    labels = predicted_labels(model, batch)
    return sample_losses(prediction_logits(model, model(**batch).logits, labels), labels)


def prediction_logits(
    model: PreTrainedModel, logits: Float[Tensor, "B ..."], labels: Int[Tensor, "B ..."]
) -> Float[Tensor, "B ..."]:
    """Return the logits of each prediction.

    Args:
        model: The model.
        logits: Its output for a batch.
        labels: The label of each prediction; see :func:`predicted_labels`.

    Raises:
        ConfigError: The labels do not fit the shape of the logits.
    """
    if is_causal(model):
        logits = logits[:, :-1]
    if logits.shape[:-1] != labels.shape:
        raise ConfigError(
            f"data: labels of shape {tuple(labels.shape)} do not fit logits of shape "
            f"{tuple(logits.shape)} of {type(model).__name__}."
        )
    return logits


def sample_losses(
    logits: Float[Tensor, "B ..."], labels: Int[Tensor, "B ..."]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Return the summed loss of each sample, and its number of predictions."""
    rows = len(labels)
    each = cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    return each.view(rows, -1).sum(1), (labels != IGNORED).view(rows, -1).sum(1).float()


def is_causal(model: PreTrainedModel) -> bool:
    """Return whether a model predicts each token from those before it."""
    return predicts_next_token(type(bare_model(model)), model.config)


def predicted_labels(model: PreTrainedModel, batch: Batch) -> Int[Tensor, "B ..."]:
    """Return the label of each prediction, or IGNORED.

    Raises:
        ConfigError: Labels are missing, or do not fit the shape of the token ids.
    """
    causal, labels = is_causal(model), batch.get("labels")
    if labels is None and causal:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
    if labels is None:
        raise ConfigError(f"data: the loss of {type(model).__name__} needs labels in each batch.")
    if causal and labels.shape != batch["input_ids"].shape:
        raise ConfigError(
            f"data: labels of shape {[*labels.shape]} do not fit input_ids of shape "
            f"{[*batch['input_ids'].shape]}."
        )
    if causal and labels.shape[1] == 1:
        raise ConfigError("data: a sample of one token has none to predict; pass two or more.")
    return labels[:, 1:] if causal else labels


@torch.no_grad()  # FSDP 2 keeps weights that it gathers here, and trains with them later
def mean_loss(model: PreTrainedModel, data: Sequence[Batch], ranks: Ranks = SINGLE) -> float:
    """Return the mean loss over all predictions, accumulated in float64.

    Args:
        model: The model, with the gates that it has.
        data: Batches of this rank.
        ranks: Processes that have the other batches.
    """
    total = count = 0.0
    for batch in data:
        loss, predictions = losses(model, batch)
        total, count = total + float(loss.double().sum()), count + float(predictions.sum())
    every = ranks.all_gather_object((total, count))
    return sum(part for part, _ in every) / max(sum(part for _, part in every), 1.0)


def run_hooked(
    run: Callable[[Batch], None], batch: Batch, handles: Iterable[RemovableHandle]
) -> None:
    """Run a batch for its hooks, then remove them.

    Args:
        run: Runs the module with the hooks on a batch.
        batch: The batch.
        handles: Handles of the hooks.
    """
    try:
        run(batch)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into eval mode, and restore the modes afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
