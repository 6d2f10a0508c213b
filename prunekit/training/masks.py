"""Masks that keep pruned weights zero while a model is trained.

Of a weight that FSDP 2 shards, each process masks its part.

Shapes: R rows, C columns of a weight as stored; a weight of experts is a stack of matrices.
"""

import operator
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
from jaxtyping import Bool, Shaped, UInt8
from prunekit_kernels import apply_all, pack, unpack
from torch import Tensor, nn
from torch.optim import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from prunekit.architectures.adapters import without_adapters
from prunekit.architectures.coverage import LINEAR_TYPES
from prunekit.errors import ConfigError
from prunekit.models.in_memory import (
    is_distributed,
    local_part,
    own_part,
    sharded_like,
    summed_over_parts,
    whole_tensor,
)
from prunekit.structured.frozen_units import HookHandles
from prunekit.training.after_backward import AfterBackward
from prunekit.training.masked_adapters import mask_all_adapters
from prunekit.training.weight_guard import MaskedWeight, WeightGuard, attach

BY_ELEMENT = (SGD, Adam, AdamW, Adamax, NAdam, RAdam, Adagrad, Adadelta, RMSprop)
"""Optimizers whose state of a weight remains zero where it was and the gradient is."""


def keep_masks(model: nn.Module, optimizer: Optimizer | None = None) -> "Masks":
    """Keep zeros in a model's linear layers zero under any optimizer.

    Gradients are masked where a weight is zero now, when the backward ends. After each step so are
    the weight and the elements of the optimizer's state for it, so that momentum and weight decay
    cannot change it. Of torch's optimizers that update weights one by one the state is masked once,
    and then remains so.
    Adapters of peft on such layers are masked too, see ``mask_adapters``. The masks take one bit
    per weight.

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
    found = {
        f"{name}.weight": MaskedWeight(module, "weight")
        for name, module in _linears(model)
        if summed_over_parts(int((local_part(module.weight) == 0).any()), module.weight)
    }
    if not found:
        raise ConfigError(
            f"keep_masks: no linear layer of {type(model).__name__} has zeros. Prune it first."
        )
    return Masks(found, optimizer, mask_all_adapters(model))


class Masks(HookHandles):
    """Masks in force; made by :func:`keep_masks`.

    Attributes:
        weights: The masked weights, by name.
        dense_gradients: Whether gradients of pruned weights are let through.
    """

    def __init__(
        self,
        places: Mapping[str, MaskedWeight],
        optimizer: Optimizer | None,
        adapters: HookHandles | None = None,
    ) -> None:
        """Put masks in force where weights are zero now.

        Args:
            places: The weights by name.
            optimizer: The optimizer whose steps are followed; None for every one.
            adapters: Masks of the adapters on the weights, removed with these.
        """
        self._adapters = adapters
        self.weights: dict[str, nn.Parameter] = {
            name: place.parameter for name, place in places.items()
        }
        self.dense_gradients = False
        self._after_backward = AfterBackward(self._mask_gradient)
        self._bits = {
            weight: pack(as_matrix(local_part(weight).detach() != 0))
            for weight in self.weights.values()
        }
        gradients = [
            weight.register_post_accumulate_grad_hook(self._gradient_hook)
            for weight in self.weights.values()
            if weight.requires_grad
        ]
        # A sharded weight is another one while its block runs.
        guarded = {n: each for n, each in places.items() if not is_distributed(each.parameter)}
        self._guards = [WeightGuard(name, place) for name, place in guarded.items()]
        guards = [attach(guard, places[guard.name]) for guard in self._guards]
        self._masked_states: dict[nn.Parameter, list[weakref.ref[Tensor]]] = {}
        self._changed: set[nn.Parameter] = set()
        super().__init__([*gradients, *guards, *self._follow(optimizer)])

    def _follow(self, optimizer: Optimizer | None) -> Iterator[RemovableHandle]:
        before_step, after_step = (
            register_optimizer_step_pre_hook,
            register_optimizer_step_post_hook,
        )
        if optimizer is not None:
            before_step = optimizer.register_step_pre_hook
            after_step = optimizer.register_step_post_hook
        yield before_step(lambda *_: self._after_backward.flush())  # a step within a backward
        yield after_step(lambda stepped, *_: self.apply(stepped))

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the masked weights, counted."""
        weights = self.weights.values()
        zeros = sum(int((local_part(weight).detach() == 0).sum()) for weight in weights)
        like = next(iter(weights))
        return summed_over_parts(zeros, like) / sum(weight.numel() for weight in weights)

    def remove(self) -> None:
        """Remove the hooks; a copy of the model can then be trained."""
        super().remove()
        if self._adapters:
            self._adapters.remove()
        for guard in self._guards:
            guard.active = False

    def keep(self, weight: nn.Parameter) -> Bool[Tensor, "..."]:
        """Return the mask of a weight, in its shape."""
        return unpack(self._whole(weight), weight.shape[-1]).view(weight.shape)

    def _whole(self, weight: nn.Parameter) -> UInt8[Tensor, "R B"]:
        """Return the packed mask of a whole weight, which may be sharded."""
        bits = self._of(weight)
        if not is_distributed(weight):
            return bits
        stacked = bits.view(*local_part(weight).shape[:-1], bits.shape[-1])
        return as_matrix(whole_tensor(sharded_like(stacked, weight)))

    def _of(self, weight: nn.Parameter) -> UInt8[Tensor, "R B"]:
        """Return the packed mask on the device where the weight is now."""
        bits = self._bits[weight]
        if bits.device != weight.device:
            bits = self._bits[weight] = bits.to(weight.device)
        return bits

    def rows(self, weight: nn.Parameter, rows: slice) -> Bool[Tensor, "R C"]:
        """Return the mask of some rows of a weight as a matrix."""
        return unpack(self._whole(weight)[rows], weight.shape[-1])

    def set_rows(self, weight: nn.Parameter, rows: slice, keep: Bool[Tensor, "R C"]) -> None:
        """Set the mask of some rows; the next :meth:`apply` zeroes the weights.

        Args:
            weight: One of the masked weights.
            rows: Rows of it as a matrix.
            keep: True where a weight is kept.
        """
        bits = self._whole(weight)
        bits[rows] = pack(keep)
        stacked = bits.view(*weight.shape[:-1], bits.shape[-1])
        own = own_part(stacked, weight)
        self._bits[weight] = as_matrix(own if own is stacked else own.clone())
        self._masked_states.pop(weight, None)
        self._changed.add(weight)

    def packed(self) -> dict[str, Tensor]:
        """Return packed masks on the CPU, by name of the weight."""
        return {name: self._bits[each].cpu().clone() for name, each in self.weights.items()}

    def check_packed(self, packed: Mapping[str, Tensor]) -> None:
        """Refuse masks that do not fit the weights.

        Raises:
            ConfigError: They are of other weights, or a pruned weight is not zero.
        """
        if differing := sorted(packed.keys() ^ self.weights.keys()):
            raise ConfigError(f"masks: they are of another model; {differing[0]} is in one only.")
        for name, weight in self.weights.items():
            bits, mine = packed[name], self._bits[weight]
            if bits.shape != mine.shape or bits.dtype != mine.dtype:
                raise ConfigError(f"masks: those of {name} have another shape than the weight.")
            keep = unpack(bits.to(weight.device), weight.shape[-1])
            if wrong := int((as_matrix(local_part(weight).detach())[~keep] != 0).sum()):
                raise ConfigError(
                    f"masks: {wrong} weights of {name} are pruned in them and not zero here. Load "
                    "the weights of the same step first."
                )

    def load_packed(self, packed: Mapping[str, Tensor]) -> None:
        """Set all masks, as :meth:`packed` returned them."""
        for name, weight in self.weights.items():
            self._bits[weight] = packed[name].to(weight.device, copy=True)
        self._masked_states.clear()

    def take_gradients(self) -> dict[nn.Parameter, Tensor]:
        """Return a copy of the gradients, and mask those of the weights."""
        taken = {}
        for weight in self.weights.values():
            if weight.grad is not None:
                taken[weight] = weight.grad.detach().clone()
                apply_all(self._of(weight), local_part(weight.grad))
        return taken

    def _gradient_hook(self, weight: Tensor) -> None:
        parameter, gradient = cast("nn.Parameter", weight), weight.grad
        if gradient is None or self.dense_gradients:
            return
        if gradient.requires_grad:  # one that is differentiated again has to be a product
            weight.grad = gradient * self.keep(parameter)
        else:
            self._after_backward.add(parameter)

    def _mask_gradient(self, weight: nn.Parameter) -> None:
        if weight.grad is not None:
            apply_all(self._of(weight), local_part(weight.grad))

    @torch.no_grad()
    def apply(self, optimizer: Optimizer | None = None) -> None:
        """Zero the pruned weights, and the optimizer's state for them.

        It runs after each step; call it after any other change of the weights.

        Args:
            optimizer: Its weights are masked, with the elements of its state, and all whose masks
                were set; None for all weights without any state.
        """
        weights: Iterable[nn.Parameter] = self._bits
        if optimizer is not None:
            every = (each for group in optimizer.param_groups for each in group["params"])
            own = dict.fromkeys(each for each in every if each in self._bits)
            weights = [*own, *(each for each in self._changed if each not in own)]
        self._changed.clear()
        for weight in weights:
            state = _state_of(optimizer, weight) if optimizer else []
            known = [each() for each in self._masked_states.get(weight, ())]
            is_masked = len(known) == len(state) and all(map(operator.is_, known, state))
            masked = [weight, *(() if is_masked else state)]
            apply_all(self._of(weight), *map(local_part, masked))
            if type(optimizer) in BY_ELEMENT:
                self._masked_states[weight] = [weakref.ref(each) for each in state]


def _state_of(optimizer: Optimizer, weight: nn.Parameter) -> list[Tensor]:
    """Return the tensors of an optimizer's state with an entry per weight."""
    values = optimizer.state.get(weight, {}).values()
    return [each for each in values if isinstance(each, Tensor) and each.shape == weight.shape]


def as_matrix(value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "R C"]:
    """Return a tensor as a matrix with rows of its last axis."""
    return value.flatten(0, -2)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the layers with a linear weight, once, without adapters."""
    seen = set()
    with without_adapters(model):
        modules = [*model.named_modules()]
    for name, module in modules:
        if isinstance(module, LINEAR_TYPES) and module.weight not in seen:
            seen.add(module.weight)
            yield name, cast("nn.Linear", module)
