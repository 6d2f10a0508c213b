"""Load whole models: with transformers, or with blocks that differ in size."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from prunekit.checkpoint.hub import checkpoint_folder
from prunekit.checkpoint.reader import Checkpoint, open_checkpoint
from prunekit.models import stock
from prunekit.models.computed import fill_computed
from prunekit.models.experts import unfused
from prunekit.models.hf_config import call_transformers, model_class, read_hf_config
from prunekit.models.memory import device_map_options, report_exhausted
from prunekit.models.units.removal import restore
from prunekit.models.weight_names import stored_names


@report_exhausted()
def load(path: str | Path | Checkpoint, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a model, with or without removed units, for inference.

    Args:
        path: A folder written by ``save_pretrained``, with or without removed units; or the same,
            opened.
        dtype: Dtype of the weights; None for the dtype in the config.

    Returns:
        The model in eval mode on the CPU.

    Raises:
        CheckpointError: The folder is not a valid checkpoint, or its config names no known class.
        NumericsError: A weight holds NaN or inf.
    """
    opened = isinstance(path, Checkpoint)
    checkpoint = path if opened else open_checkpoint(checkpoint_folder(str(path)))
    config = read_hf_config(checkpoint)
    model_class(checkpoint, config)

    def build() -> PreTrainedModel:
        with no_init_weights():
            model = stock.build_model(config, dtype)
        restore(model)
        return model

    model = call_transformers(checkpoint, "cannot build the model from it", build)
    fill_computed(model)
    with unfused(model):  # files have a matrix for each expert
        stored = stored_names(model, checkpoint)
        tensors = checkpoint.read(set(stored.values()))
        for name in dict(model.named_parameters()).keys() & stored.keys():
            checkpoint.check_finite(stored[name], tensors[stored[name]])
        _fill(model, stored, tensors)
    return model.eval()


@contextmanager
def open_whole(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> Iterator[PreTrainedModel]:
    """Load a whole model with transformers, offloaded where necessary.

    Args:
        checkpoint: The model; compressed weights remain compressed.
        dtype: Dtype of its weights in memory.
        device: Device to run on.

    Raises:
        CheckpointError: transformers cannot open it.
    """
    count = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    with TemporaryDirectory(prefix="prunekit-") as offload:
        device_map = device_map_options(count * dtype.itemsize, device, offload)
        model = call_transformers(
            checkpoint,
            "cannot open the model",
            lambda: stock.open_model(checkpoint.folder, dtype=dtype, **device_map),
        )
        yield model if device_map else model.to(device)  # pyright: ignore


@torch.no_grad()
def _fill(model: PreTrainedModel, stored: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tie_as_stored(model, stored, tensors)
    values = model.state_dict(keep_vars=True)
    for name, source in stored.items():
        values[name].copy_(tensors[source])


def tie_as_stored(
    model: PreTrainedModel, stored: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    """Tie weights that the config calls tied, unless their stored values differ.

    Args:
        model: The model, with or without weights.
        stored: Name in the files of each tensor.
        tensors: Stored tensors by their names there, at least those of tied weights that the files
            hold twice.
    """
    model.tie_weights()
    for name, other in model.all_tied_weights_keys.items():
        one, two = stored[name], stored[other]
        # Every T5 config says that weights are tied, but some files store two different matrices.
        if one != two and not torch.equal(tensors[one], tensors[two]):
            module, _, attribute = name.rpartition(".")
            own = nn.Parameter(model.get_parameter(name).detach().clone())
            setattr(model.get_submodule(module), attribute, own)
