"""Tiny models with LoRA adapters of peft that change their output."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.support.units import randomized_model

PEFT_WARNS = (
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore:Model .*`tie_word_embeddings=True`:UserWarning",
)
"""Warnings raised in peft: about transformers and Python, and adapters of tied weights."""


def adapted_model(model_type, targets="all-linear", *, base=None, names=("default",), **settings):
    """Return a model of peft whose adapters are random.

    Args:
        model_type: Any tiny model.
        targets: ``target_modules`` of peft.
        base: The model; by default a tiny one with random biases and norms.
        names: Names of the adapters; the first one is active.
        settings: Further settings of ``LoraConfig``.
    """
    peft = pytest.importorskip("peft")
    base = randomized_model(model_type) if base is None else base
    turned = any(isinstance(module, Conv1D) for module in base.modules())
    config = {"r": 2, "target_modules": targets, "fan_in_fan_out": turned, **settings}
    first, *others = names
    adapted = peft.get_peft_model(base, peft.LoraConfig(**config), first)
    for name in others:
        adapted.add_adapter(name, peft.LoraConfig(**config))
    randomize_adapters(adapted)
    return adapted.eval()


@torch.no_grad()
def randomize_adapters(model: nn.Module) -> None:
    """Set all factors to random values of the size of trained ones."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def zero_randomly(model: nn.Module, share: float = 0.5) -> None:
    """Set a share of the weights of all linears to zero, adapters excepted."""
    generator = torch.Generator().manual_seed(5)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and "lora_" not in name:
            module.weight *= torch.rand(module.weight.shape, generator=generator) >= share
