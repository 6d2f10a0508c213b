"""Permute channels within a block, so that an n:m pattern costs less.

The order of a block's neurons, and of the channels within its heads, concerns this block alone:
rows of the linears that write them and columns of the linear that reads them are permuted together,
and the block's output is unchanged up to rounding. A pattern that chooses among neighbouring inputs
of the reader may then lose much less, at no cost at inference.

Shapes: R rows, C channels, G groups of m channels, O outputs and I inputs of a linear; an axis has
K orders of C channels, each shared by P parts of the reader's inputs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.architectures import Stack
from prunekit.architectures.coverage import ADVICE
from prunekit.errors import ConfigError
from prunekit.models.layout import Block, Linear, read_weight
from prunekit.models.orientation import outputs_first
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.models.units.heads_neurons import UnitIndex, head_groups, neuron_groups
from prunekit.patterns.n_of_m import NOfM
from prunekit.sparsify.calibrate import gather_statistics
from prunekit.sparsify.channel_order import find_channel_order
from prunekit.sparsify.recipe import Recipe
from prunekit.statistics import ColumnEnergy, StageStatistics

Orders = Mapping[str, list[list[int]]]
"""Name of an axis → its orders, each a permutation of the channels' present numbers."""


@dataclass(frozen=True)
class Axis:
    """Channels of a block that can be permuted without changing its output.

    Attributes:
        name: Name of the attention, or of the linear that reads the neurons, within the block.
        writers: Linears whose outputs the channels are, with indices [K, C].
        reader: The one linear whose inputs they are, with indices [K, P, C].
    """

    name: str
    writers: tuple[UnitIndex, ...]
    reader: UnitIndex


def check_permutable(model: PreTrainedModel, stacks: Sequence[StackRunner]) -> None:
    """Refuse a model whose heads and neurons are not declared.

    Raises:
        ConfigError: No stack declares attentions or feed-forwards.
    """
    if not any(runner.stack.attentions or runner.stack.feed_forwards for runner in stacks):
        raise ConfigError(
            "permute: no architecture declares where models of type "
            f"{model.config.model_type!r} keep their heads and neurons. {ADVICE}"
        )


def channel_axes(block: nn.Module, stack: Stack) -> Iterator[Axis]:
    """Yield the axes of a block: channels within heads, and neurons."""
    for site in head_groups("", block, stack):
        # Query and key channels are paired by rotary embeddings, so only the values' are free.
        value = site.writers[-1]
        rows = UnitIndex(value.linear, value.index.flatten(1))
        yield Axis(site.name, (rows,), site.reader)
    for site in neuron_groups("", block, stack):
        rows = [UnitIndex(part.linear, part.index.view(1, -1)) for part in site.writers]
        columns = UnitIndex(site.reader.linear, site.reader.index.view(1, 1, -1))
        yield Axis(site.name, tuple(rows), columns)


def channel_orders(loaded: LoadedBlock, block: Block, recipe: Recipe) -> Orders:
    """Return the channel orders that suit the pattern best.

    Axes whose readers are not pruned, or whose channels are not a multiple of m, are left out; so
    are all if the recipe does not permute.

    Args:
        loaded: The block, not pruned yet.
        block: Its linears.
        recipe: The settings.
    """
    pattern = recipe.pattern
    if not recipe.permute or not isinstance(pattern, NOfM):
        return {}
    linears = {loaded.module.get_submodule(linear.path): linear for linear in block.pruned}
    free = [
        axis
        for axis in channel_axes(loaded.module, loaded.runner.stack)
        if axis.reader.linear in linears and axis.reader.index.shape[2] % pattern.m == 0
    ]
    stages = [[linears[axis.reader.linear]] for axis in free]
    found = [stats for _, stats in gather_statistics(loaded, stages, (ColumnEnergy,))]
    loaded.checks.settle()

    def search() -> Orders:
        result = {}
        for axis, (linear,), stats in zip(free, stages, found, strict=True):
            saliency = weight_saliency(loaded, linear, stats)
            result[axis.name] = [
                find_channel_order(saliency[:, index].flatten(0, 1), pattern).tolist()
                for index in axis.reader.index
            ]
        return result

    return loaded.ranks.run_on_main(search)


def weight_saliency(
    loaded: LoadedBlock, linear: Linear, stats: StageStatistics
) -> Float[Tensor, "O I"]:
    """Return w² Σ x² of each weight, the square of Wanda's score.

    Args:
        loaded: The block.
        linear: A linear of it.
        stats: Column energies of the linear's input.
    """
    return read_weight(loaded.module, linear).square_().mul_(stats[ColumnEnergy].total)


@torch.no_grad()
def permute_channels(
    loaded: LoadedBlock, orders: Orders, values: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Permute the channels of a block, in place.

    Args:
        loaded: The block.
        orders: Orders of some of its axes.
        values: Tensors to permute in place of the block's parameters, by the names of these.

    Returns:
        Names of the parameters whose entries moved.
    """
    if not orders:
        return []
    names = {module: name for name, module in loaded.module.named_modules()}
    values = dict(loaded.module.named_parameters()) if values is None else values
    moved = []

    def move(linear: nn.Module, part: str, target: Tensor, source: Tensor, dim: int = 0) -> None:
        name = f"{names[linear]}.{part}"
        if name not in values:
            return
        value = values[name] if part == "bias" else outputs_first(linear, values[name])
        value = value.T if dim else value
        value[target] = value[source]
        moved.append(name)

    for axis in channel_axes(loaded.module, loaded.runner.stack):
        if axis.name not in orders:
            continue
        chosen = torch.tensor(orders[axis.name])
        for part in axis.writers:
            source = part.index.gather(1, chosen).flatten()
            target = part.index.flatten()
            for kind in ("weight", "bias"):
                move(part.linear, kind, target, source)
        index = axis.reader.index
        source = index.gather(2, chosen[:, None].expand_as(index)).flatten()
        move(axis.reader.linear, "weight", index.flatten(), source, dim=1)
    return list(dict.fromkeys(moved))
