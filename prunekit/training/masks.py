"""Masks that keep pruned weights zero while a model is trained."""

import weakref
from collections.abc import Callable, Iterator
from typing import cast

import torch
from prunekit_kernels import pack, unpack
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

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
        ConfigError: No linear layer has zeros. Later, in a forward of training: a weight is not the
            masked one, since the model is a copy or its weights were replaced.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"keep_masks: a {type(model).__name__} is not a model.")
    found = {name: module for name, module in _linears(model) if (module.weight == 0).any()}
    if not found:
        raise ConfigError(
            f"keep_masks: no linear layer of {type(model).__name__} has zeros. Prune it first."
        )
    return Masks(found, optimizer)


class Masks(HookHandles):
    """Masks in force; made by :func:`keep_masks`.

    Attributes:
        weights: The masked weights, by name.
    """

    def __init__(self, linears: dict[str, nn.Linear], optimizer: Optimizer | None) -> None:
        self.weights: dict[str, nn.Parameter] = {
            f"{name}.weight": cast("nn.Parameter", linear.weight)
            for name, linear in linears.items()
        }
        self._bits = {weight: pack(weight.detach() != 0) for weight in self.weights.values()}
        gradients = [
            weight.register_hook(lambda grad, weight=weight: grad * self._keep(weight))
            for weight in self.weights.values()
            if weight.requires_grad
        ]
        after_step = register_optimizer_step_post_hook
        if optimizer is not None:
            after_step = optimizer.register_step_post_hook
        self._guards = [WeightGuard(name, linear) for name, linear in linears.items()]
        guards = map(_attach, self._guards, linears.values())
        super().__init__([*gradients, *guards, after_step(lambda stepped, *_: self.apply(stepped))])

    def remove(self) -> None:
        """Remove the hooks; a copy of the model can then be trained."""
        super().remove()
        for guard in self._guards:
            guard.active = False

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


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the layers with a linear weight, each weight once."""
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, LINEAR_TYPES) and module.weight not in seen:
            seen.add(module.weight)
            yield name, cast("nn.Linear", module)


def _attach(guard: "WeightGuard", linear: nn.Module) -> RemovableHandle:
    for number, hook in [*linear._forward_pre_hooks.items()]:
        if isinstance(hook, WeightGuard) and hook.weight() is not linear.weight:
            del linear._forward_pre_hooks[number]  # of the model that this one is a copy of
    return linear.register_forward_pre_hook(guard)


class WeightGuard:
    """Forward hook that checks that a layer has its masked weight.

    In a copy of the model the weight is another one, likewise after
    ``load_state_dict(assign=True)``; the optimizer does not know it either.
    """

    def __init__(self, name: str, linear: nn.Module) -> None:
        self.name, self.active = name, True
        self.weight: Callable[[], Tensor | None] = weakref.ref(linear.weight)  # pyright: ignore

    def __call__(self, linear: nn.Module, _: object) -> None:
        """Compare the weight, before a forward of training.

        Raises:
            ConfigError: It is another one.
        """
        weight = linear.weight
        trains = torch.is_grad_enabled() and weight.requires_grad  # pyright: ignore
        if self.active and trains and self.weight() is not weight:
            raise ConfigError(
                f"keep_masks: the weight of {self.name} is not the masked one: the model is a "
                "copy, or its weights were replaced. Call keep_masks again and make a new "
                "optimizer; to train without masks, call remove()."
            )

    def __deepcopy__(self, memo: dict[int, object]) -> "WeightGuard":
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _guard_of_no_weight, (self.name,)


def _guard_of_no_weight(name: str) -> WeightGuard:
    guard = WeightGuard.__new__(WeightGuard)
    guard.name, guard.active, guard.weight = name, True, _no_weight
    return guard


def _no_weight() -> None:
    return None
