"""What is left of a model, changed to make up for what goes: block after block, in one walk.

``refit`` fits the linears that read units anew; ``bias`` adds to their bias what the units that go
give on average, b + W_P E[x_P] (An et al. 2024, arXiv:2312.11983, eq. 8).

Shapes: N samples, T tokens, I inputs of a linear that reads units, O its outputs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import cast

import torch
from jaxtyping import Float, Int
from prunekit_kernels import gram, mirror
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.architectures import find
from prunekit.kinds import Compensation
from prunekit.layout import runners
from prunekit.lockstep import Lockstep
from prunekit.ranks import ALONE, Ranks
from prunekit.refitting import refit
from prunekit.sites import Site, matrix
from prunekit.walk import Visit, batches, walk


def compensate(
    model: PreTrainedModel,
    found: Sequence[Site],
    kept: Mapping[str, Sequence[int]],
    ids: Int[Tensor, "N T"],
    how: Compensation = "refit",
    ranks: Ranks = ALONE,
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
    for visit in walk(model, runners(model, find(model)), None, parts, ranks):
        here = [module for module in visit.block.modules() if module in readers]
        if here:
            _change_block(visit, [readers[module] for module in here], kept, how)
        yield visit.name


def _change_block(
    visit: Visit, here: Sequence[Site], kept: Mapping[str, Sequence[int]], how: Compensation
) -> None:
    steps = Lockstep(list(visit.calls()), visit.name, 'compensate = "none"')
    with closing(steps.stages([[site.reader.linear] for site in here])) as halts:
        for number, inputs in halts:
            site = here[number]
            rows = [x.flatten(0, -2) for x in inputs]
            gone = torch.ones(site.units, dtype=torch.bool)
            gone[list(kept[site.name])] = False
            columns = site.reader.index[gone].flatten().to(rows[0].device)
            if how == "refit":
                refit(site, _gram(rows, visit.ranks), kept[site.name])
            else:
                _add_mean(site, rows, columns, visit.ranks)
            with torch.no_grad():
                matrix(site.reader.linear)[:, columns] = 0
    visit.hidden[:] = steps.outputs
    visit.onward = False


def _gram(rows: Sequence[Float[Tensor, "T I"]], ranks: Ranks) -> Float[Tensor, "I I"]:
    """Return XᵀX a token."""
    width = rows[0].shape[1]
    total = torch.zeros(width, width, device=rows[0].device)
    for x in rows:
        gram(x, total)
    ranks.add(total, "statistics")
    return mirror(total).div_(_tokens(rows, ranks))


def _tokens(rows: Sequence[Tensor], ranks: Ranks) -> int:
    return sum(ranks.exchange(sum(map(len, rows))))


@torch.no_grad()
def _add_mean(
    site: Site, rows: Sequence[Float[Tensor, "T I"]], columns: Int[Tensor, " C"], ranks: Ranks
) -> None:
    """Add to the bias what some columns give on average."""
    total = torch.stack([x[:, columns].double().sum(0) for x in rows]).sum(0)
    ranks.add(total, "statistics")
    mean = total / _tokens(rows, ranks)
    bias = cast("Tensor", site.reader.linear.bias)
    bias += (matrix(site.reader.linear)[:, columns].double() @ mean).to(bias)
