"""Channels in a better order: n:m costs less where the weights of a group are unlike each other.

The order of a block's neurons, and of the channels within its heads, is nobody's business but the
block's: rows of what writes them and columns of what reads them move together, and the block gives
what it gave, up to the order in which a sum is added up. A pattern that counts along the inputs of
the reader may lose much less then, at no cost later.

Shapes: R rows, C channels, G groups of m channels, O outputs and I inputs of a linear; an axis has
K orders of C channels, each of which P parts of the reader's inputs share.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.architectures import Stack
from prunekit.architectures.coverage import ADVICE
from prunekit.errors import ConfigError
from prunekit.models.layout import Block, Linear, read
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.pipeline import LoadedBlock
from prunekit.models.units.heads_neurons import UnitIndex, heads_of, neurons_of, oriented
from prunekit.patterns.n_of_m import NOfM
from prunekit.sparsify.calibrate import gather
from prunekit.sparsify.channel_order import order
from prunekit.sparsify.recipe import Recipe
from prunekit.statistics import ColumnEnergy, StageStatistics

Orders = Mapping[str, list[list[int]]]
"""Name of an axis → its orders, each the channels as they are to stand."""


@dataclass(frozen=True)
class Axis:
    """Channels of a block that may stand in any order.

    Attributes:
        name: Name of the attention, or of the linear that reads the neurons, within the block.
        writers: Outputs of linears that make them, [K, C].
        reader: Inputs of the one linear that reads them, [K, P, C].
    """

    name: str
    writers: tuple[UnitIndex, ...]
    reader: UnitIndex


def check_permutable(model: PreTrainedModel, stacks: Sequence[StackRunner]) -> None:
    """Refuse a model of which nobody says where its heads and neurons are.

    Raises:
        ConfigError: So it is.
    """
    if not any(runner.stack.attentions or runner.stack.feed_forwards for runner in stacks):
        raise ConfigError(
            "permute: nothing says where models of type "
            f"{model.config.model_type!r} keep their heads and neurons. {ADVICE}"
        )


def axes(block: nn.Module, stack: Stack) -> Iterator[Axis]:
    """Yield the axes of a block: channels within each head, and neurons."""
    for site in heads_of("", block, stack):
        # Query and key channels are paired by rotary embeddings, so only the values' are free.
        value = site.writers[-1]
        rows = UnitIndex(value.linear, value.index.flatten(1))
        yield Axis(site.name, (rows,), site.reader)
    for site in neurons_of("", block, stack):
        rows = [UnitIndex(part.linear, part.index.view(1, -1)) for part in site.writers]
        columns = UnitIndex(site.reader.linear, site.reader.index.view(1, 1, -1))
        yield Axis(site.name, tuple(rows), columns)


def orders(visit: LoadedBlock, plan: Block, recipe: Recipe) -> Orders:
    """Return the orders in which the visited block, still dense, loses least to the pattern.

    Axes whose readers are not pruned, or whose channels are no multiple of m, are left as they are;
    all are, if that is not asked for.
    """
    pattern = recipe.pattern
    if not recipe.permute or not isinstance(pattern, NOfM):
        return {}
    linears = {visit.block.get_submodule(linear.path): linear for linear in plan.pruned}
    free = [
        axis
        for axis in axes(visit.block, visit.runner.stack)
        if axis.reader.linear in linears and axis.reader.index.shape[2] % pattern.m == 0
    ]
    stages = [[linears[axis.reader.linear]] for axis in free]
    found = [stats for _, stats in gather(replace(visit, dense=None), stages, (ColumnEnergy,))]

    def search() -> Orders:
        result = {}
        for axis, (linear,), stats in zip(free, stages, found, strict=True):
            whole = saliency(visit, linear, stats)
            result[axis.name] = [
                order(whole[:, index].flatten(0, 1), pattern).tolist()
                for index in axis.reader.index
            ]
        return result

    return visit.ranks.run_on_main(search)


def saliency(visit: LoadedBlock, linear: Linear, stats: StageStatistics) -> Float[Tensor, "O I"]:
    """Return what each weight of a linear is worth: Wanda's score, squared, w² Σ x²."""
    return read(visit.block, linear).square_().mul_(stats[ColumnEnergy].total)


@torch.no_grad()
def rearrange(
    visit: LoadedBlock, found: Orders, values: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Put the channels of the visited block into the orders found, in place.

    Args:
        visit: Of the block.
        found: Orders of some of its axes.
        values: Tensors by the names that parameters have within the block, to be moved as those
            are; None for the parameters themselves.

    Returns:
        Names of those whose entries moved.
    """
    names = {module: name for name, module in visit.block.named_modules()}
    values = dict(visit.block.named_parameters()) if values is None else values
    moved = []

    def move(linear: nn.Module, part: str, target: Tensor, source: Tensor, dim: int = 0) -> None:
        name = f"{names[linear]}.{part}"
        if name not in values:
            return
        value = values[name] if part == "bias" else oriented(linear, values[name])
        value = value.T if dim else value
        value[target] = value[source]
        moved.append(name)

    for axis in axes(visit.block, visit.runner.stack):
        if axis.name not in found:
            continue
        chosen = torch.tensor(found[axis.name])
        for part in axis.writers:
            source = part.index.gather(1, chosen).flatten()
            target = part.index.flatten()
            for kind in ("weight", "bias"):
                move(part.linear, kind, target, source)
        index = axis.reader.index
        source = index.gather(2, chosen[:, None].expand_as(index)).flatten()
        move(axis.reader.linear, "weight", index.flatten(), source, dim=1)
    return list(dict.fromkeys(moved))
