"""Optimizers that go on training a model whose parameters are replaced.

An optimizer knows parameters by identity: after a removal it would go on with the old ones, and the
new ones would not be trained. So new ones take their places in its groups, with the same part of
its state.
"""

import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NoReturn, Protocol

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from prunekit.errors import ConfigError
from prunekit.models.in_memory import is_sharded
from prunekit.structured.scheduled import torch_optimizer

Optimizers = Optimizer | Sequence[Optimizer] | None
"""One or several optimizers of torch, also wrapped by Accelerate."""
SHARDED = (
    "model: its weights are sharded over processes (FSDP or ZeRO-3), and parts cannot be cut. "
    "Train on with the gates closed. At the end save the gates with save(file) and the weights "
    "unsharded; load both in one process, and finalize there."
)


def check_trains(optimizer: object, model: nn.Module, others: Collection[Tensor] = ()) -> Optimizer:
    """Return the optimizer of torch that trains a model, without Accelerate's wrapper.

    Args:
        optimizer: The optimizer.
        model: The model.
        others: Tensors beside its parameters that it may train.

    Raises:
        ConfigError: It is none of torch, or trains another model.
    """
    found = torch_optimizer(optimizer)
    if not _trained(found) & {*model.parameters(), *others}:
        raise ConfigError(
            f"optimizer: the {type(found).__name__} trains no parameter of this model. Pass the "
            "one that trains it."
        )
    return found


def check_replaceable(
    model: nn.Module, others: Collection[Tensor], given: Optimizers
) -> tuple[list[Optimizer], list[DistributedDataParallel]]:
    """Return the given optimizers and DDP wrappers, checked.

    Args:
        model: The model.
        others: Tensors beside its parameters that optimizers may train.
        given: All optimizers in use that train the model.

    Raises:
        ConfigError: An optimizer in use was not given, one that was trains no parameter of the
            model or has state that cannot be narrowed, a parameter has hooks, or the model is
            sharded.
    """
    _check_whole(model)
    tensors = {*model.parameters(), *others}
    several = given if isinstance(given, list | tuple) else [given]
    optimizers = [check_trains(each, model, others) for each in several if each is not None]
    for optimizer in optimizers:
        for parameter in _trained(optimizer) & tensors:
            _check_state(optimizer, parameter)

    def holds(each: Any) -> bool:  # noqa: ANN401
        if isinstance(each, Optimizer):
            return torch_optimizer(each) not in optimizers and bool(_trained(each) & tensors)
        return any(module is model for module in each.modules())

    holders = _alive((Optimizer, DistributedDataParallel, FullyShardedDataParallel), holds)
    wrappers = [each for each in holders if isinstance(each, DistributedDataParallel)]
    if any(isinstance(each, FullyShardedDataParallel) for each in holders):
        raise ConfigError(SHARDED)
    unseen = {
        type(torch_optimizer(each)).__name__: None for each in holders if each not in wrappers
    }
    if unseen:
        raise ConfigError(
            f"optimizer: {' and '.join(unseen)}, in use, trains parameters of this model. They are "
            "replaced now, and it would go on with the old ones. Pass it as optimizer=…, so that "
            "it gets the new ones and keeps the state of the kept units, or delete it."
        )
    return optimizers, wrappers


def retire(wrappers: Sequence[DistributedDataParallel]) -> None:
    """Let wrappers refuse to run, as their parameters were replaced."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise ConfigError(
            "DistributedDataParallel: units of the model were removed, and this wrapper knows the "
            "former parameters. Wrap the model again, on all processes, and go on with the new "
            "wrapper and the same optimizer: wrapper = DistributedDataParallel(wrapper.module)."
        )

    for wrapper in wrappers:
        wrapper.forward = refuse


class Replacement(Protocol):
    """A parameter that another one replaced."""

    @property
    def before(self) -> Tensor:
        """The replaced parameter."""
        ...

    @property
    def after(self) -> Tensor:
        """The new one."""
        ...

    def of(self, whole: Tensor, /) -> Tensor:
        """Return the new one's state from the old one's."""
        ...


def replace_parameters(
    optimizer: Optimizer, replacements: Sequence[Replacement], removed: AbstractSet[Tensor]
) -> None:
    """Put new parameters with the old ones' state into an optimizer.

    Args:
        optimizer: An optimizer of torch.
        replacements: The replacements in their order.
        removed: Tensors that it no longer trains.
    """
    steps: dict[Tensor, Replacement] = {step.before: step for step in replacements}

    def latest(parameter: Tensor) -> Tensor:
        while parameter in steps:
            parameter = steps[parameter].after
        return parameter

    state: dict[Tensor, Any] = {}
    for parameter, values in optimizer.state.items():
        if parameter not in removed:
            state[latest(parameter)] = _replaced(parameter, values, steps)
    optimizer.state.clear()
    optimizer.state.update(state)
    for group in optimizer.param_groups:
        group["params"][:] = [latest(each) for each in group["params"] if each not in removed]


def _replaced(
    parameter: Tensor, values: Mapping[str, Any], steps: Mapping[Tensor, Replacement]
) -> dict[str, Any]:
    """Return the state of the parameter that replaced another in the end."""
    found = dict(values)
    while parameter in steps:
        step = steps[parameter]
        for name, value in found.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                found[name] = step.of(value)
        parameter = step.after
    return found


def _trained(optimizer: Optimizer) -> set[Tensor]:
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


def _check_state(optimizer: Optimizer, parameter: Tensor) -> None:
    """Refuse state that cannot be narrowed with its parameter."""
    for name, value in optimizer.state.get(parameter, {}).items():
        fits = isinstance(value, Tensor | int | float | str | None)
        if isinstance(value, Tensor) and value.shape != parameter.shape:
            fits = value.numel() == 1
        if not fits:
            found = f"shape {[*value.shape]}" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(
                f"optimizer: {type(optimizer).__name__} has the state {name} ({found}) for a "
                f"parameter of shape {[*parameter.shape]}, and which part of it belongs to the "
                "kept units is not known. Delete the optimizer, finalize, and make a new one."
            )


def _check_whole(model: nn.Module) -> None:
    """Refuse parameters that are sharded, hooked or copied."""
    if is_sharded(model):
        raise ConfigError(SHARDED)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "_hp_mapping"):
            raise ConfigError(
                "model: DeepSpeed's ZeRO holds flat copies of the parameters that are replaced "
                "now. Train on with the gates closed, and finalize after it, without DeepSpeed."
            )
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ConfigError(
                f"{name}: there are hooks on its gradient, such as those of keep_masks, and the "
                "smaller parameter would have none. Remove them first, and add them again."
            )


def _alive(classes: type | tuple[type, ...], holds: Callable[[Any], bool]) -> list[Any]:
    """Return the objects of some classes that hold parts of a model.

    torch keeps no list of optimizers, and hooks on steps see only those that have made one; the
    garbage collector knows all objects. Some may only be waiting for it.

    Args:
        classes: Classes of the objects.
        holds: Returns whether an object is one of those.
    """

    def find() -> list[Any]:
        every = gc.get_objects()
        # By type(), as isinstance would ask proxies and lazy modules for their __class__.
        types = {each for each in set(map(type, every)) if issubclass(each, classes)}
        return [each for each in every if type(each) in types and holds(each)] if types else []

    if find():
        gc.collect()
        return find()
    return []
