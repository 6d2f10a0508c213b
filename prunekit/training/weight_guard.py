"""Guards that notice when the masked weight of a module is replaced."""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunekit.errors import ConfigError


class MaskedWeight(NamedTuple):
    """A weight by its module, so that its replacement is noticed."""

    module: nn.Module
    attribute: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that the module has now."""
        return getattr(self.module, self.attribute)


def is_masked(place: MaskedWeight) -> bool:
    """Return whether masks are in force on a weight."""
    return any(
        hook.active and hook.weight() is place.parameter
        for hook in place.module._forward_pre_hooks.values()
        if isinstance(hook, WeightGuard)
    )


def attach(guard: "WeightGuard", place: MaskedWeight) -> RemovableHandle:
    """Attach a guard, in place of those of a copied model."""
    module, attribute = place
    for number, hook in [*module._forward_pre_hooks.items()]:
        if not isinstance(hook, WeightGuard) or hook.attribute != attribute:
            continue
        if hook.weight() is not place.parameter:
            del module._forward_pre_hooks[number]
    return module.register_forward_pre_hook(guard)


class WeightGuard:
    """Forward hook that checks that a module has its masked weight.

    In a copy of the model the weight is another one, likewise after
    ``load_state_dict(assign=True)``; the optimizer does not know it either.
    """

    def __init__(self, name: str, place: MaskedWeight) -> None:
        self.name, self.attribute, self.active = name, place.attribute, True
        self.weight: Callable[[], Tensor | None] = weakref.ref(place.parameter)

    def __call__(self, module: nn.Module, _: object) -> None:
        """Compare the weight, before a forward of training.

        Raises:
            ConfigError: It is another one.
        """
        if not self.active or not torch.is_grad_enabled():
            return
        weight = getattr(module, self.attribute)
        if weight.requires_grad and self.weight() is not weight:
            raise ConfigError(
                f"keep_masks: {self.name} is not the masked weight: the model is a copy, or its "
                "weights were replaced. Call keep_masks (or make a GradualPruner) again, with a "
                "new optimizer; to train without masks, call remove()."
            )

    def __deepcopy__(self, memo: dict[int, object]) -> "WeightGuard":
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _guard_of_no_weight, (self.name, self.attribute)


def _guard_of_no_weight(name: str, attribute: str) -> WeightGuard:
    guard = WeightGuard.__new__(WeightGuard)
    guard.name, guard.attribute, guard.active, guard.weight = name, attribute, True, _no_weight
    return guard


def _no_weight() -> None:
    return None
