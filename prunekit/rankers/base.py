"""A ranker says how much each head or neuron matters.

Shapes: U units of a site, B samples, T tokens, I inputs of the linear that reads the units.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.probes.batches import Batch, valid_tokens
from prunekit.probes.gates import Gate
from prunekit.sites import Kind, Site

Scores = dict[str, Float[Tensor, " U"]]
"""A score of each unit, by the name of its site; float64 on the CPU, higher stays."""


@dataclass(frozen=True)
class Subject:
    """The model that is looked at, as it is gated now.

    Attributes:
        model: In eval mode.
        sites: Where its units are, all of one kind.
        gates: The gate of each site, by its name.
        batches: What it is run on; none for a ranker that reads weights alone.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    gates: Mapping[str, Gate]
    batches: Sequence[Batch]


class Ranker(BaseModel, ABC):
    """Weights, and what a model does with samples, → a score of each unit.

    Fields are settings, each documented by the string under it. ``kinds`` are the units it can
    rank; ``needs_data`` says whether it runs the model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: ClassVar[str]
    kinds: ClassVar[frozenset[Kind]] = frozenset({"heads", "neurons"})
    needs_data: ClassVar[bool] = True

    @abstractmethod
    def score(self, subject: Subject) -> Scores:
        """Return the scores; higher stays."""


def look(
    subject: Subject, see: Callable[[Site, Float[Tensor, "T I"]], None], *, gated: bool = True
) -> None:
    """Run the batches and show what the linear of each site reads, padding left out.

    ``gated``: as it is after the gates; otherwise as it is before its own.
    """
    for batch in subject.batches:
        handles = [
            site.reader.linear.register_forward_pre_hook(
                _showing(site, valid_tokens(batch, decodes=site.stack.reads is not None), see),
                prepend=not gated,
            )
            for site in subject.sites
        ]
        try:
            with torch.no_grad():
                subject.model(**batch)
        finally:
            for handle in handles:
                handle.remove()


def _showing(
    site: Site, valid: Tensor | None, see: Callable[[Site, Tensor], None]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2)
        see(site, rows if valid is None else rows[valid.flatten()])

    return hook
