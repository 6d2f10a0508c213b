"""What is left of a model, fitted anew to make up for what goes: block after block, in one walk.

Shapes: N samples, T tokens, I inputs of a linear that reads units, O its outputs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import torch
from jaxtyping import Int
from prunekit_kernels import gram, mirror
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.architectures import find
from prunekit.layout import runners
from prunekit.lockstep import Lockstep
from prunekit.refitting import refit
from prunekit.sites import Site, matrix
from prunekit.walk import Visit, batches, walk


def compensate(
    model: PreTrainedModel,
    found: Sequence[Site],
    kept: Mapping[str, Sequence[int]],
    ids: Int[Tensor, "N T"],
) -> Iterator[str]:
    """Refit each linear that reads units to what it gave with all of them; yield each block's name.

    A linear is fitted to the inputs that it has once everything before it is without the units
    that go. Weights of these are 0 afterwards; the model is changed in place, and needs no gates.

    Args:
        model: With its weights.
        found: Sites of one or several kinds.
        kept: The units that stay, by site.
        ids: The calibration text.
    """
    readers = {site.reader.linear: site for site in found if len(kept[site.name]) < site.units}
    for visit in walk(model, runners(model, find(model)), None, batches(ids, model.device)):
        here = [module for module in visit.block.modules() if module in readers]
        if here:
            _refit_block(visit, [readers[module] for module in here], kept)
        yield visit.name


def _refit_block(visit: Visit, here: Sequence[Site], kept: Mapping[str, Sequence[int]]) -> None:
    steps = Lockstep(list(visit.calls()))
    with closing(steps.stages([[site.reader.linear] for site in here])) as halts:
        for number, inputs in halts:
            site = here[number]
            width = inputs[0].shape[-1]
            total = torch.zeros(width, width, device=inputs[0].device)
            tokens = 0
            for x in inputs:
                rows = x.flatten(0, -2)
                gram(rows, total)
                tokens += len(rows)
            refit(site, mirror(total).div_(tokens), kept[site.name])
            gone = torch.ones(site.units, dtype=torch.bool)
            gone[list(kept[site.name])] = False
            weight = matrix(site.reader.linear)
            with torch.no_grad():
                weight[:, site.reader.index[gone].flatten().to(weight.device)] = 0
    visit.hidden[:] = steps.outputs
    visit.onward = False
