"""What is left of a model, changed to make up for what goes: block after block, in one walk.

``refit`` fits the linears that read units anew; ``bias`` adds to their bias what the units that go
give on average, b + W_P E[x_P] (An et al. 2024, arXiv:2312.11983, eq. 8).

Shapes: N samples, T tokens, I inputs of a linear that reads units, O its outputs.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from jaxtyping import Float, Int
from prunekit_kernels import gram, mirror
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.architectures import find
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.models.layout import runners
from prunekit.models.sequential.activation_cache import ActivationCache
from prunekit.models.sequential.pipeline import LoadedBlock, batches, iterate_blocks
from prunekit.models.units.heads_neurons import Site, matrix
from prunekit.models.units.kinds import Compensation
from prunekit.structured.refit import refit


def compensate(
    model: PreTrainedModel,
    found: Sequence[Site],
    kept: Mapping[str, Sequence[int]],
    ids: Int[Tensor, "N T"],
    how: Compensation = "refit",
    ranks: Ranks = SINGLE,
) -> Iterator[str]:
    """Let each linear that reads units give what it gave with all of them; yield blocks by name.

    It is fitted to the inputs that it has once everything before it is without the units
    that go. Weights of these are 0 afterwards; the model is changed in place, and needs no gates.

    Args:
        model: With its weights.
        found: Sites of one or several kinds.
        kept: The units that stay, by site.
        ids: The calibration text.
        how: "refit" or "bias", for which each of these linears has to have one.
        ranks: Processes with the same model that have other text.
    """
    readers = {site.reader.linear: site for site in found if len(kept[site.name]) < site.units}
    parts = batches(ids, model.device)
    for visit in iterate_blocks(model, runners(model, find(model)), None, parts, ranks):
        here = [module for module in visit.block.modules() if module in readers]
        if here:
            _change_block(visit, [readers[module] for module in here], kept, how)
        yield visit.name


def _change_block(
    visit: LoadedBlock, here: Sequence[Site], kept: Mapping[str, Sequence[int]], how: Compensation
) -> None:
    paths = {module: path for path, module in visit.block.named_modules()}
    readers = {paths[site.reader.linear]: site for site in here}
    order = visit.order(readers)
    visit.cache = ActivationCache(visit.block, [[path] for path in order], visit.new_hidden_states)
    for number, path in enumerate(order, 1):
        site = readers[path]
        gone = torch.ones(site.units, dtype=torch.bool)
        gone[list(kept[site.name])] = False
        columns = site.reader.index[gone].flatten().to(visit.device)
        if how == "refit":
            refit(site, _gram(visit, path), kept[site.name])
        else:
            _add_mean(visit, path, columns)
        with torch.no_grad():
            matrix(site.reader.linear)[:, columns] = 0
        visit.cache.stage = number


def _gram(visit: LoadedBlock, path: str) -> Float[Tensor, "I I"]:
    """Return XᵀX a token of what a linear reads."""
    inputs, tokens = matrix(visit.block.get_submodule(path)).shape[1], 0
    total = torch.zeros(inputs, inputs, device=visit.device)
    for x in visit.reads(path):
        rows = x.flatten(0, -2)
        gram(rows, total)
        tokens += len(rows)
    visit.ranks.all_reduce_sum(total, "statistics")
    return mirror(total).div_(sum(visit.ranks.all_gather_object(tokens)))


@torch.no_grad()
def _add_mean(visit: LoadedBlock, path: str, columns: Int[Tensor, " C"]) -> None:
    """Add to the bias what some columns give on average."""
    total = torch.zeros(len(columns), dtype=torch.float64, device=columns.device)
    tokens = 0
    for x in visit.reads(path):
        rows = x.flatten(0, -2)
        total += rows[:, columns].double().sum(0)
        tokens += len(rows)
    visit.ranks.all_reduce_sum(total, "statistics")
    mean = total / sum(visit.ranks.all_gather_object(tokens))
    linear = visit.block.get_submodule(path)
    bias = cast("Tensor", linear.bias)
    bias += (matrix(linear)[:, columns].double() @ mean).to(bias)
