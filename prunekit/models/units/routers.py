"""The router of a module of experts: tensors and numbers that follow the experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.errors import ShapeError
from prunekit.models.units.expert_axes import ExpertCount

TOP_K = ("top_k", "num_experts_per_tok")
"""Attributes of routers with the number of experts that each token takes."""


class RouterAxis(NamedTuple):
    """Axis of a parameter or buffer with a row for each expert.

    Attributes:
        module: The module that has it.
        name: Its name there.
        axis: The axis.
    """

    module: nn.Module
    name: str
    axis: int

    @property
    def tensor(self) -> Tensor:
        """The current tensor."""
        return getattr(self.module, self.name)

    @property
    def is_parameter(self) -> bool:
        """Whether the tensor is a parameter, or else a buffer."""
        return self.name in self.module._parameters

    def set(self, tensor: Tensor) -> None:
        """Replace the tensor, also a parameter by a tensor that is none."""
        held: dict[str, Tensor | None] = self.module._buffers
        if self.is_parameter:
            held = self.module._parameters  # pyright: ignore[reportAssignmentType]
        held[self.name] = tensor


@dataclass(frozen=True)
class Router:
    """What chooses among the experts of a layer.

    Attributes:
        module: The smallest module that holds experts and router.
        axes: The tensors with a row for each expert.
        counters: Module and name of each attribute that is the number of experts, except those of
            the module of the experts.
    """

    module: nn.Module
    axes: tuple[RouterAxis, ...]
    counters: tuple[tuple[nn.Module, str], ...]

    def set_count(self, count: int) -> None:
        """Set the number of experts."""
        for module, name in self.counters:
            setattr(module, name, count)

    def top_k(self, experts: str) -> int:
        """Return how many experts each token takes.

        Raises:
            ShapeError: No attribute is that number.
        """
        found = {
            getattr(module, name)
            for module in self.module.modules()
            for name in TOP_K
            if isinstance(getattr(module, name, None), int)
        }
        if len(found) != 1:
            raise ShapeError(
                f"{experts}: nothing says how many experts a token takes: no module with the "
                f"router has one of the attributes {', '.join(TOP_K)}."
            )
        return found.pop()


def find_router(model: PreTrainedModel, block: str, experts: str, count: ExpertCount) -> Router:
    """Return the router of a module of experts.

    Args:
        model: The model, with or without weights.
        block: Full name of the block.
        experts: Full name of the module of experts.
        count: Where the model states the number of experts.

    Raises:
        ShapeError: The experts have no router, or one that looks up tokens in a table, or one that
            first chooses among groups of experts.
    """
    names = [name for name in count.axes if name.startswith(f"{block}.")]
    if not names:
        raise ShapeError(f"{experts}: no tensor of {block} has a row for each of them.")
    path = _common([experts, *(name.rpartition(".")[0] for name in names)])
    module, axes = model.get_submodule(path), []
    for name in names:
        owner, _, attribute = name.rpartition(".")
        axes.append(RouterAxis(model.get_submodule(owner), attribute, count.axes[name]))
    counters = [
        (model.get_submodule(owner), attribute)
        for owner, attribute in count.numbers
        if f"{owner}.".startswith(f"{path}.") and not f"{owner}.".startswith(f"{experts}.")
    ]
    _check_choice(experts, module, axes)
    return Router(module, tuple(axes), tuple(counters))


def _common(paths: Sequence[str]) -> str:
    """Return the path of the smallest module that holds all of these."""
    parts = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(each[0] for each in takewhile(lambda each: len({*each}) == 1, parts))


def _check_choice(experts: str, module: nn.Module, axes: Sequence[RouterAxis]) -> None:
    """Refuse routers that choose by more than their rows.

    Raises:
        ShapeError: A table holds numbers of experts, or experts are in groups.
    """
    for axis in axes:
        for name, buffer in axis.module.named_buffers():
            if buffer.ndim and not buffer.is_floating_point() and name != axis.name:
                raise ShapeError(
                    f"{experts}: its router has a table, {name}, which numbers the experts, so "
                    "none can be taken out."
                )
    for each in module.modules():
        groups = getattr(each, "num_group", None) or 1
        if groups > 1:
            raise ShapeError(
                f"{experts}: its router first chooses among {groups} groups of experts (n_group in "
                "config.json), and a removal would move experts from one group to another."
            )
