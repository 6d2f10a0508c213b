"""The weights of linears as parts of parameters.

The experts of a block may be one parameter; the weight of each of their linears is a view of it.

Shapes: O output features, I input features; R rows, C columns of a parameter as stored.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.architectures.expert_layout import is_fused
from prunekit.errors import ConfigError
from prunekit.models.experts import unfused
from prunekit.models.in_memory import is_distributed, is_sharded, whole_tensor
from prunekit.models.layout import Linear
from prunekit.models.orientation import stored_transposed
from prunekit.training.masks import Masks, as_matrix
from prunekit.training.weight_guard import MaskedWeight, is_masked


@dataclass(frozen=True)
class WeightView:
    """The part of a parameter that is the weight of one linear.

    Attributes:
        parameter: The parameter.
        rows: Its rows, as a matrix.
        transposed: Whether it is stored inputs first.
    """

    parameter: nn.Parameter
    rows: slice
    transposed: bool

    @property
    def matrix(self) -> Shaped[Tensor, "O I"]:
        """The weight, outputs first; gathered in a copy if it is sharded."""
        return self.of(whole_tensor(self.parameter))

    def of(self, stored: Shaped[Tensor, "..."]) -> Shaped[Tensor, "O I"]:
        """Return the same part of a tensor stored like the parameter."""
        return self._turned(as_matrix(stored)[self.rows])

    def keep(self, masks: Masks) -> Bool[Tensor, "O I"]:
        """Return the mask of the weight."""
        return self._turned(masks.rows(self.parameter, self.rows))

    def set_keep(self, masks: Masks, keep: Bool[Tensor, "O I"]) -> None:
        """Set the mask of the weight."""
        masks.set_rows(self.parameter, self.rows, self._turned(keep))

    def _turned(self, value: Tensor) -> Tensor:
        return value.T if self.transposed else value


def weight_places(model: nn.Module) -> dict[str, MaskedWeight]:
    """Return each matrix of a model by name; shared ones once."""
    return {
        name: MaskedWeight(model.get_submodule(path), attribute)
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
        for path, _, attribute in [name.rpartition(".")]
    }


def weight_views(
    model: nn.Module, parameters: Iterable[nn.Parameter], linears: Iterable[Linear]
) -> dict[str, WeightView]:
    """Return the weight of each linear as a part of a parameter.

    Args:
        model: The model, whose experts may be unfused now.
        parameters: Its parameters, before they were unfused.
        linears: The linears.
    """
    own = {*parameters}
    by_storage = {
        each.untyped_storage().data_ptr(): each for each in own if not is_distributed(each)
    }
    views = {}
    for linear in linears:
        weight = model.get_parameter(f"{linear.name}.weight")
        if weight not in own and not weight.is_contiguous():
            raise ConfigError(
                f"model: {linear.name} is stored transposed or interleaved among other experts, "
                "which masks while training do not know. Prune it after training."
            )
        owner = weight if weight in own else by_storage[weight.untyped_storage().data_ptr()]
        first = int(weight.storage_offset() - owner.storage_offset()) // owner.shape[-1]
        rows = slice(first, first + len(weight))
        transposed = stored_transposed(model.get_submodule(linear.name))
        views[linear.name] = WeightView(owner, rows, transposed)
    return views


def find_weights(
    model: PreTrainedModel, linears: Iterable[Linear]
) -> tuple[dict[str, WeightView], dict[str, MaskedWeight]]:
    """Return the weights of linears, and the parameters that hold them.

    Args:
        model: The model, with its experts as transformers stores them.
        linears: The linears, of experts too.

    Returns:
        The weight of each linear by its name, and the parameters by theirs.
    """
    check_experts(model)
    places = weight_places(model)
    parameters = [place.parameter for place in places.values()]
    with unfused(model), torch.no_grad():
        views = weight_views(model, parameters, linears)
    used = {view.parameter for view in views.values()}
    return views, {name: place for name, place in places.items() if place.parameter in used}


def check_experts(model: nn.Module) -> None:
    """Refuse sharded weights that hold several experts.

    Raises:
        ConfigError: The model has some.
    """
    fused = (name for name, each in model.named_modules() if is_fused(each))
    if is_sharded(model) and (name := next(fused, None)):
        raise ConfigError(
            f"model: {name} has its experts in one tensor, which is sharded over processes, so "
            "that their masks are unknown. Use DDP, or prune before or after the training."
        )


def check_unmasked(places: Mapping[str, MaskedWeight]) -> None:
    """Refuse weights on which masks are in force.

    Raises:
        ConfigError: There is one; it is named.
    """
    if taken := next((name for name, place in places.items() if is_masked(place)), None):
        raise ConfigError(
            f"model: {taken} has masks already, of keep_masks or another GradualPruner. Call "
            "remove() of these first."
        )
