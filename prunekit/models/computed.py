"""Parameters that no checkpoint stores, since the model computes them.

Marian's table of positions is one: ``save_pretrained`` leaves it out.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@torch.no_grad()
def fill_computed(model: PreTrainedModel) -> None:
    """Make these parameters buffers with the values that the model computes."""
    names = model._keys_to_ignore_on_save or ()
    for name in sorted(names):
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        empty = module._parameters.pop(attribute, None)
        if empty is None:
            continue
        value = nn.Parameter(torch.empty_like(empty, device="cpu"), requires_grad=False)
        module._parameters[attribute] = value
        model._init_weights(module)
        del module._parameters[attribute]
        module.register_buffer(attribute, value.detach(), persistent=False)


def computed_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the buffers that :func:`fill_computed` made, by name."""
    names = model._keys_to_ignore_on_save or set()
    return {name: value for name, value in model.named_buffers() if name in names}
