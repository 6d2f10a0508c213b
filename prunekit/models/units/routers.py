"""The router of a module of experts.

Some routers first choose among groups of consecutive experts. Each group then keeps equally many,
so that no expert moves to another group.

Shapes: U experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
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
    """The router of a layer of experts.

    Attributes:
        module: The smallest module that holds experts and router.
        axes: The tensors with a row for each expert.
        counters: Module and name of each attribute that is the number of experts, except those of
            the module of the experts.
        top_k: Experts that each token takes.
        groups: Groups of experts among which it chooses first; 1 where it does not.
        top_groups: Groups that it chooses.
    """

    module: nn.Module
    axes: tuple[RouterAxis, ...]
    counters: tuple[tuple[nn.Module, str], ...]
    top_k: int
    groups: int = 1
    top_groups: int = 1

    def set_count(self, count: int) -> None:
        """Set the number of experts."""
        for module, name in self.counters:
            setattr(module, name, count)

    def check_left(self, experts: str, left: int) -> None:
        """Refuse a number of experts among which it cannot choose.

        Args:
            experts: Name of the experts, for the message.
            left: Number of those that are left.

        Raises:
            ShapeError: A token takes more, or those of the groups that it chooses are fewer.
        """
        if self.groups > 1:
            needed = self.groups * max(2, -(-self.top_k // self.top_groups))
            if left % self.groups or left < needed:
                raise ShapeError(
                    f"{experts}: {left} experts would be left. Its router chooses "
                    f"{self.top_groups} of {self.groups} groups first, then {self.top_k} experts "
                    f"of these, so that a multiple of {self.groups} and at least {needed} are kept."
                )
        elif left < self.top_k:
            raise ShapeError(
                f"{experts}: {left} experts would be left, and each token takes {self.top_k}. "
                "Remove fewer."
            )

    def check_open(self, experts: str, is_open: Bool[Tensor, " U"]) -> None:
        """Refuse open experts among which it cannot choose.

        Args:
            experts: Name of the experts, for the message.
            is_open: Which are open.

        Raises:
            ShapeError: See :meth:`check_left`; or groups have unequal numbers of open ones.
        """
        sizes = is_open.view(self.groups, -1).sum(1).tolist()
        if len({*sizes}) > 1:
            raise ShapeError(
                f"{experts}: its router chooses among {self.groups} groups of experts first, which "
                f"have from {min(sizes)} to {max(sizes)} open ones. Close equally many of each; "
                "a ranker that leaves out one at a time cannot."
            )
        self.check_left(experts, sum(sizes))

    def balanced(
        self, scores: Float[Tensor, " U"], keep: Bool[Tensor, " U"]
    ) -> Float[Tensor, " U"]:
        """Return scores by which the lowest are equally many of each group.

        Args:
            scores: Score of each expert; higher is kept.
            keep: False for those that are removed already.
        """
        if self.groups == 1:
            return scores
        known = scores.double().masked_fill(~keep, -torch.inf).view(self.groups, -1)
        order = known.sort(dim=1, descending=True, stable=True).indices
        ranks = torch.zeros_like(known)
        places = torch.arange(known.shape[1], dtype=known.dtype).expand_as(known)
        return -ranks.scatter_(1, order, places).flatten()


def find_router(model: PreTrainedModel, block: str, experts: str, count: ExpertCount) -> Router:
    """Return the router of a module of experts.

    Args:
        model: The model, with or without weights.
        block: Full name of the block.
        experts: Full name of the module of experts.
        count: Where the model states the number of experts.

    Raises:
        ShapeError: The experts have no router, or one that looks up tokens in a table, or one that
            does not say how many it chooses.
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
    _refuse_tables(experts, axes)
    numbers = [_attributes(module, names) for names in (TOP_K, ("num_group",), ("topk_group",))]
    if len(numbers[0]) != 1 or any(len(each) > 1 for each in numbers):
        raise ShapeError(
            f"{experts}: nothing says how many experts a token takes: no module with the router "
            f"has one of the attributes {', '.join(TOP_K)}."
        )
    single = [next(iter(each), 1) for each in numbers]
    return Router(module, tuple(axes), tuple(counters), *single)


def _common(paths: Sequence[str]) -> str:
    """Return the path of the smallest module that holds all of these."""
    parts = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(each[0] for each in takewhile(lambda each: len({*each}) == 1, parts))


def _attributes(module: nn.Module, names: Sequence[str]) -> set[int]:
    """Return the values of attributes of a module and those in it."""
    found = (getattr(each, name, None) for each in module.modules() for name in names)
    return {value for value in found if isinstance(value, int)}


def _refuse_tables(experts: str, axes: Sequence[RouterAxis]) -> None:
    """Refuse routers that choose by more than their rows.

    Raises:
        ShapeError: A table holds numbers of experts.
    """
    for axis in axes:
        for name, buffer in axis.module.named_buffers():
            if buffer.ndim and not buffer.is_floating_point() and name != axis.name:
                raise ShapeError(
                    f"{experts}: its router has a table, {name}, which numbers the experts, so "
                    "none can be taken out."
                )
