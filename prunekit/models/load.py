"""Load models whose blocks differ in size, which stock transformers cannot."""

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from prunekit.checkpoint.hub import checkpoint_folder
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import CheckpointError
from prunekit.models.units.removal import restore
from prunekit.models.weight_names import stored_names


def load(path: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a model, with or without removed units, for inference.

    Args:
        path: A folder written by ``save_pretrained``, with or without removed units.
        dtype: Dtype of the weights; None for the dtype in the config.

    Returns:
        The model in eval mode on the CPU.

    Raises:
        CheckpointError: The folder is not a valid checkpoint, or its config names no known class.
    """
    checkpoint = open_checkpoint(checkpoint_folder(str(path)))
    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    name = (config.architectures or [""])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: architectures names {name!r}, which "
            f"transformers {transformers.__version__} does not have."
        )
    # Checkpoint.read decompresses weights, so the model is built dense.
    vars(config).pop("quantization_config", None)
    with no_init_weights():
        model: PreTrainedModel = model_class._from_config(config, dtype=dtype or config.dtype)
    restore(model)
    stored = stored_names(model, checkpoint)
    _fill(model, stored, checkpoint.read(set(stored.values())))
    return model.eval()


@torch.no_grad()
def _fill(model: PreTrainedModel, stored: dict[str, str], tensors: dict[str, Tensor]) -> None:
    model.tie_weights()
    for name, other in model.all_tied_weights_keys.items():
        # Every T5 config says that weights are tied, but some files store two different matrices.
        if not torch.equal(tensors[stored[name]], tensors[stored[other]]):
            module, _, attribute = name.rpartition(".")
            own = nn.Parameter(model.get_parameter(name).detach().clone())
            setattr(model.get_submodule(module), attribute, own)
    values = model.state_dict(keep_vars=True)
    for name, source in stored.items():
        values[name].copy_(tensors[source])
