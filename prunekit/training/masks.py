"""Zeros that stay zero: while a pruned model is trained on, and when an adapter is merged into it.

Shapes: O output features, I input features, R rank of an adapter.
"""

from collections.abc import Iterator

import torch
from prunekit_kernels import pack, unpack
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

from prunekit.errors import ConfigError
from prunekit.structured.frozen_units import HookHandles


def keep_masks(model: nn.Module, optimizer: Optimizer | None = None) -> "Masks":
    """Keep the zeros of a model's linear layers zero, whatever optimizer trains it.

    Gradients are zeroed where a weight is zero now, and after each step so are the weight and what
    the optimizer remembers of it, entry by entry: momentum and weight decay cannot bring it back.
    Costs a bit a weight.

    Args:
        model: Its linear layers with zeros; the weights themselves are kept, not copied.
        optimizer: The one to watch; None: any that steps on these weights, until ``remove()``.

    Returns:
        What undoes it: ``remove()``, or the end of a ``with`` block.

    Raises:
        ConfigError: No linear layer has zeros.
    """
    weights = {name: weight for name, weight in _linear_weights(model) if (weight == 0).any()}
    if not weights:
        raise ConfigError(
            f"keep_masks: no linear layer of {type(model).__name__} has zeros. Prune it first."
        )
    return Masks(weights, optimizer)


class Masks(HookHandles):
    """Masks in force; made by :func:`keep_masks`.

    Attributes:
        weights: The weights that are watched, by name.
    """

    def __init__(self, weights: dict[str, nn.Parameter], optimizer: Optimizer | None) -> None:
        self.weights = weights
        self._bits = {weight: pack(weight.detach() != 0) for weight in weights.values()}
        gradients = [
            weight.register_hook(lambda grad, weight=weight: grad * self._keep(weight))
            for weight in weights.values()
            if weight.requires_grad
        ]
        watch = register_optimizer_step_post_hook
        if optimizer is not None:
            watch = optimizer.register_step_post_hook
        super().__init__([*gradients, watch(lambda stepped, *_: self.apply(stepped))])

    def _keep(self, weight: nn.Parameter) -> Tensor:
        bits = self._bits[weight]
        if bits.device != weight.device:
            bits = self._bits[weight] = bits.to(weight.device)
        return unpack(bits, weight.shape[1])

    @torch.no_grad()
    def apply(self, optimizer: Optimizer | None = None) -> None:
        """Zero what was pruned: weights and, entry by entry, what ``optimizer`` remembers of them.

        Runs by itself after each step; call it after anything else that changed the weights.
        """
        stepped = self._bits.keys()
        if optimizer is not None:
            groups = optimizer.param_groups
            stepped = [weight for group in groups for weight in group["params"]]
        for weight in stepped:
            if weight in self._bits:
                gone = ~self._keep(weight)
                state = optimizer.state.get(weight, {}) if optimizer else {}
                for remembered in [weight, *state.values()]:
                    if isinstance(remembered, Tensor) and remembered.shape == weight.shape:
                        remembered.masked_fill_(gone, 0)


def _linear_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what is to be watched; a weight that two layers share once."""
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module.weight not in seen:
            seen.add(module.weight)
            yield f"{name}.weight", module.weight  # pyright: ignore
