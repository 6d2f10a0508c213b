"""Masks that keep pruned weights zero while a model is trained."""

from collections.abc import Iterator

import torch
from prunekit_kernels import pack, unpack
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from prunekit.architectures.coverage import LINEAR_TYPES
from prunekit.errors import ConfigError
from prunekit.structured.frozen_units import HookHandles


def keep_masks(model: nn.Module, optimizer: Optimizer | None = None) -> "Masks":
    """Keep zeros in a model's linear layers zero under any optimizer.

    Gradients are masked where a weight is zero now. After each step so are the weight and the
    elements of the optimizer's state for it, so that momentum and weight decay cannot change it.
    The masks take one bit per weight.

    Args:
        model: The model; linear layers without zeros are not masked.
        optimizer: The optimizer whose steps are followed; None for every optimizer that updates
            these weights.

    Returns:
        The masks, in force until ``remove()`` or the end of a ``with`` block.

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
        weights: The masked weights, by name.
    """

    def __init__(self, weights: dict[str, nn.Parameter], optimizer: Optimizer | None) -> None:
        self.weights = weights
        self._bits = {weight: pack(weight.detach() != 0) for weight in weights.values()}
        gradients = [
            weight.register_hook(lambda grad, weight=weight: grad * self._keep(weight))
            for weight in weights.values()
            if weight.requires_grad
        ]
        after_step = register_optimizer_step_post_hook
        if optimizer is not None:
            after_step = optimizer.register_step_post_hook
        super().__init__([*gradients, after_step(lambda stepped, *_: self.apply(stepped))])

    def _keep(self, weight: nn.Parameter) -> Tensor:
        bits = self._bits[weight]
        if bits.device != weight.device:
            bits = self._bits[weight] = bits.to(weight.device)
        return unpack(bits, weight.shape[1])

    @torch.no_grad()
    def apply(self, optimizer: Optimizer | None = None) -> None:
        """Zero the pruned weights, and the optimizer's state for them.

        It runs after each step; call it after any other change of the weights.

        Args:
            optimizer: Its weights are masked, with the elements of its state; None for all weights
                without any state.
        """
        weights = self._bits.keys()
        if optimizer is not None:
            groups = optimizer.param_groups
            weights = [weight for group in groups for weight in group["params"]]
        for weight in weights:
            if weight in self._bits:
                pruned = ~self._keep(weight)
                state = optimizer.state.get(weight, {}) if optimizer else {}
                for value in [weight, *state.values()]:
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        value.masked_fill_(pruned, 0)


def _linear_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the weights of linear layers, shared ones once."""
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, LINEAR_TYPES) and module.weight not in seen:
            seen.add(module.weight)
            yield f"{name}.weight", module.weight  # pyright: ignore
