"""Opens folders of models whose blocks differ in size, which stock transformers cannot."""

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from prunekit.checkpoint.hub import find
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import CheckpointError
from prunekit.models.units.removal import restore
from prunekit.models.weight_names import stored_names


def load(path: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the model in a folder, in eval mode on the CPU, whatever each block has left.

    Args:
        path: A folder that ``save_pretrained`` wrote, of a model with units removed or any other.
        dtype: None for the type that its config names.

    Raises:
        CheckpointError: The folder is not sound, or its config names no known class.
    """
    checkpoint = open_checkpoint(find(str(path)))
    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: architectures names {name!r}, which "
            f"transformers {transformers.__version__} does not have."
        )
    # What is stored compressed, the checkpoint gives dense.
    vars(config).pop("quantization_config", None)
    with no_init_weights():
        model: PreTrainedModel = kind._from_config(config, dtype=dtype or config.dtype)
    restore(model)
    stored = stored_names(model, checkpoint)
    _fill(model, stored, checkpoint.read(set(stored.values())))
    return model.eval()


@torch.no_grad()
def _fill(model: PreTrainedModel, stored: dict[str, str], tensors: dict[str, Tensor]) -> None:
    model.tie_weights()
    for name, other in model.all_tied_weights_keys.items():
        # The config of every T5 says tied; the files of some hold two matrices that differ.
        if not torch.equal(tensors[stored[name]], tensors[stored[other]]):
            module, _, attribute = name.rpartition(".")
            own = nn.Parameter(model.get_parameter(name).detach().clone())
            setattr(model.get_submodule(module), attribute, own)
    values = model.state_dict(keep_vars=True)
    for name, source in stored.items():
        values[name].copy_(tensors[source])
