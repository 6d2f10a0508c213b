"""Units of a model in memory: scored, gated, pruned, taken back, and at last removed.

    heads = prunekit.heads(model)
    heads.prune(heads.score("output-norm", tokens), 0.3)
    heads.finalize()

Until ``finalize`` nothing of the model is changed, and ``undo`` takes back each step. Layers and
units are counted from 0; a layer is one of ``heads.places``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from jaxtyping import Bool, Float
from pydantic import ValidationError
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from prunekit.allocations.schedules import linear
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError, PrunekitError, ShapeError
from prunekit.models.units.base import UnitGroup
from prunekit.models.units.find import places
from prunekit.models.units.heads_neurons import Site, matrix
from prunekit.models.units.kinds import WHOLE, Kind
from prunekit.models.units.removal import apply_removal, parameters, refuse_unequal
from prunekit.models.units.stock_config import check_uniform_record, stock_entries
from prunekit.structured.agreement import redundancy
from prunekit.structured.batches import Batch, Data, batches, still
from prunekit.structured.frozen_units import FrozenUnits
from prunekit.structured.gate import Gate
from prunekit.structured.rankers import GatedModel, Ranker, Scores, rankers
from prunekit.structured.refit import gather, refit
from prunekit.structured.selection import Removed, Scope, choose

ACTIVE = 0.01
"""A unit whose gate is above this counts as active."""

STOCK = "A stock Hugging Face model: save_pretrained writes a folder that any tool opens."
OWN = (
    "save_pretrained writes a folder that prunekit.load opens, and from_pretrained after `import "
    "prunekit`; without prunekit it is refused, with an error about mismatched sizes."
)


@dataclass(frozen=True)
class Finalized:
    """What became of a model.

    Attributes:
        kept: The units that each place kept.
        parameters: How many parameters the model had and has.
        stock: Whether its config says its shape, so that any tool opens what is saved.
        note: The same in words; where it does not, why.
    """

    kept: dict[str, list[int]]
    parameters: tuple[int, int]
    stock: bool
    note: str


class Gates:
    """Gates on all units of one kind of a model.

    Attributes:
        model: The model.
        kind: What the units are.
        places: Where they are.
        sites: The same of heads and neurons, which one linear reads.
        gates: The gate of each place, by its name.
    """

    def __init__(self, model: PreTrainedModel, kind: Kind) -> None:
        self.model = model
        self.kind: Kind = kind
        self._attach()

    def score(
        self,
        ranker: str | Ranker,
        data: Data | None = None,
        *,
        ranks: Ranks = SINGLE,
        **settings: Any,  # noqa: ANN401
    ) -> Scores:
        """Return the score of each unit in the model as it is gated now; higher stays.

        Args:
            ranker: A ranker, or its name.
            data: Token ids [N, T] or batches; None for a ranker that reads weights alone.
            ranks: Processes with gates on the same model that have other data.
            settings: Of a ranker that is named.

        Raises:
            ConfigError: There is no such ranker or setting, or the data does not do.
        """
        chosen = _ranker(ranker, settings)
        for part in chosen.parts:
            if self.kind not in part.kinds:
                ranked = " and ".join(sorted(part.kinds))
                raise ConfigError(f"ranker {part.name}: it ranks {ranked}, not {self.kind}.")
        found = batches(data, self.model) if chosen.needs_data else []
        with still(self.model):
            return chosen.score(replace(self._subject(found), ranks=ranks))

    def prune(
        self,
        scores: Scores,
        sparsity: float,
        *,
        scope: Scope = "global",
        least: int = 1,
        round_to: int = 1,
    ) -> list[Removed]:
        """Close the gates of the lowest scores; see :func:`prunekit.structured.selection.choose`.

        ``round_to``: every width that the units which stay make up is rounded up to a multiple of
        this, and of the heads where transformers divides the hidden size among them.
        """
        multiples = {place.name: place.multiple(round_to) for place in self.places}
        chosen = choose(scores, self.keep, sparsity, scope=scope, least=least, multiples=multiples)
        self._remember()
        for layer, unit, _ in chosen:
            self._gate(layer, unit).keep[unit] = False
        return chosen

    def prune_in_steps(
        self,
        ranker: Ranker,
        data: Data | None,
        sparsity: float,
        *,
        steps: int,
        scope: Scope = "global",
    ) -> list[Removed]:
        """Prune a part of the units at a time and score what is left anew after each.

        Units that do the same each look useless while the other is there. As many steps as units
        go is the greedy search. One ``undo`` takes back all steps; if one fails, none is done.
        """
        if steps < 1:
            raise ConfigError(f"steps: {steps} is not at least 1.")
        units = sum(place.units for place in self.places)
        start = sum(int((~keep).sum()) for keep in self.keep.values()) / units
        parts = [linear(step, steps, sparsity, start) for step in range(1, steps + 1)]
        depth, removed = len(self._history), []
        try:
            for part in parts:
                removed += self.prune(self.score(ranker, data), part, scope=scope)
        except PrunekitError:
            while len(self._history) > depth:
                self.undo()
            raise
        del self._history[depth + 1 :]
        return removed

    def close(self, keep: Mapping[str, Bool[Tensor, " U"]]) -> None:
        """Close the gates of all other units, by place; what is closed already stays so."""
        self._remember()
        for name, gate in self.gates.items():
            gate.keep &= keep[name].to(gate.keep.device)

    def follow(self) -> dict[str, str]:
        """Find the places anew after blocks were taken out; there is nothing to undo afterwards.

        Returns:
            The name that each place had, by the one that it has now.
        """
        before = {_anchor(place): (place.name, self.gates[place.name]) for place in self.places}
        self.detach()
        self._attach()
        names = {}
        for place in self.places:
            names[place.name], old = before[_anchor(place)]
            gate = self.gates[place.name]
            gate.value, gate.keep = old.value, old.keep
        return names

    def reactivate(self, units: Iterable[tuple[int, int]]) -> None:
        """Open pruned units (layer, unit) again, with the factor they had."""
        found = [(self._gate(layer, unit), unit) for layer, unit in units]
        self._remember()
        for gate, unit in found:
            gate.keep[unit] = True

    def hold(self, optimizer: Optimizer) -> FrozenUnits:
        """Keep the weights of pruned units as they are while the optimizer trains the others.

        Returns:
            What undoes it: ``remove()``, or the end of a ``with`` block.
        """
        return FrozenUnits(self.places, self.gates, optimizer)

    def gate(self, layer: int, unit: int, value: float) -> None:
        """Multiply what a unit gives by ``value``."""
        gate = self._gate(layer, unit)
        self._remember()
        with torch.no_grad():
            gate.value[unit] = value

    def undo(self) -> None:
        """Take back the last ``prune``, ``reactivate`` or ``gate``.

        Raises:
            ConfigError: There is none.
        """
        if not self._history:
            raise ConfigError("undo: nothing is left to take back.")
        for gate, (value, keep) in zip(self.gates.values(), self._history.pop(), strict=True):
            with torch.no_grad():
                gate.value.copy_(value)
            gate.keep.copy_(keep)

    def redundancy(self, data: Data) -> dict[str, Float[Tensor, "U U"]]:
        """Return, for each site, how alike what two of its units give is, from 0 to 1."""
        with still(self.model):
            grams = gather(self._subject(batches(data, self.model)))
        return {site.name: redundancy(site, grams[site.name]) for site in self.sites}

    @property
    def keep(self) -> dict[str, Bool[Tensor, " U"]]:
        """Which units are not pruned, by site, on the CPU."""
        return {name: gate.keep.cpu() for name, gate in self.gates.items()}

    @property
    def kept(self) -> dict[str, list[int]]:
        """The units that are not pruned, by site, in ascending order."""
        return {name: keep.nonzero().flatten().tolist() for name, keep in self.keep.items()}

    def active(self, threshold: float = ACTIVE) -> int:
        """Return how many units have a factor above ``threshold``."""
        return sum(int((gate.factor > threshold).sum()) for gate in self.gates.values())

    def finalize(self, data: Data | None = None, *, stock: bool = False) -> Finalized:
        """Remove what is pruned from the matrices; the model answers as it did when gated.

        Factors of kept units go into the weights. The gates stay on what is left, all at 1.

        Args:
            data: Refits the linears that read the units, block after block, to what they gave with
                all units on this data; the answers are then closer to the dense model's.
            stock: Refuse, before anything is changed, if a stock config cannot say the new shape.

        Raises:
            ConfigError: There is data but nothing that could be refitted, or a gate is neither open
                nor closed and no weight can stand for it.
            ShapeError: ``stock``, or the kind, wants a config to say the new shape, and it cannot;
                the message names the constraint.
            CheckpointError: See :func:`prunekit.models.units.removal.refuse_unequal`.
        """
        kept = self.kept
        self._refuse_halves(data)
        entries, note = None, STOCK
        try:
            entries = stock_entries(self.model, self.places, kept)
            check_uniform_record(self.model, kept)
        except ShapeError as error:
            if stock or (entries is None and self.kind in WHOLE):
                raise
            if entries is None:
                refuse_unequal(self.sites)
            note = f"{error} {OWN}"
        before = parameters(self.model)
        if data is not None:
            self._refit(batches(data, self.model), kept)
        self._fold()
        self.detach()
        apply_removal(self.model, self.places, kept, entries)
        self._attach()
        return Finalized(kept, (before, parameters(self.model)), note == STOCK, note)

    def __enter__(self) -> Self:
        """Return itself; the gates are taken out at the end of the ``with`` block."""
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Take all gates out of the model, which then computes what its weights say."""
        for gate in self.gates.values():
            gate.detach()

    def _attach(self) -> None:
        self.places = places(self.model, self.kind)
        self.sites = [place for place in self.places if isinstance(place, Site)]
        self.gates = {place.name: Gate(place) for place in self.places}
        self._history: list[list[tuple[Tensor, Tensor]]] = []

    def _subject(self, found: list[Batch]) -> GatedModel:
        # A ranker says which kinds it ranks, and reads no more of a place than all of these have.
        return GatedModel(self.model, cast("list[Site]", self.places), self.gates, found)

    def _gate(self, layer: int, unit: int) -> Gate:
        if not 0 <= layer < len(self.places) or not 0 <= unit < self.places[layer].units:
            raise ConfigError(
                f"({layer}, {unit}): there is no such unit; layers go to {len(self.places) - 1}, "
                f"units to {max(place.units for place in self.places) - 1}."
            )
        return self.gates[self.places[layer].name]

    def _refuse_halves(self, data: Data | None) -> None:
        if self.kind not in WHOLE:
            return
        if data is not None:
            raise ConfigError(f"data: no linear that could be refitted reads {self.kind}.")
        for name, gate in self.gates.items():
            half = gate.keep & (gate.value != 1)
            if bool(half.any()):
                raise ConfigError(
                    f"{name}: the gate of unit {int(half.nonzero()[0])} is neither 0 nor 1, and no "
                    f"weight can stand for a factor of {self.kind}. Prune it, or set it to 1."
                )

    def _remember(self) -> None:
        self._history.append(
            [(gate.value.detach().clone(), gate.keep.clone()) for gate in self.gates.values()]
        )

    def _refit(self, found: list[Batch], kept: Mapping[str, list[int]]) -> None:
        with still(self.model):
            for site in self.sites:
                if len(kept[site.name]) < site.units:
                    subject = GatedModel(self.model, [site], self.gates, found)
                    refit(site, gather(subject, gated=False)[site.name], kept[site.name])

    @torch.no_grad()
    def _fold(self) -> None:
        """Put the factors of kept units into the weights that read them."""
        for site in self.sites:
            gate = self.gates[site.name]
            if bool((gate.value[gate.keep] != 1).any()):
                weight = matrix(site.reader.linear)
                weight *= gate.value.to(weight)[site.owner.to(weight.device)]


def heads(model: PreTrainedModel) -> Gates:
    """Return gates on the attention heads of a model.

    Under grouped queries a unit is a key head with all query heads that share it.

    Raises:
        CheckpointError: The family is not declared.
    """
    return Gates(model, "heads")


def blocks(model: PreTrainedModel) -> Gates:
    """Return gates on the whole blocks of a model; a closed one gives on what it reads.

    Raises:
        CheckpointError: The family is not declared and cannot be probed.
    """
    return Gates(model, "blocks")


def hidden(model: PreTrainedModel) -> Gates:
    """Return gates on the coordinates of a model's residual stream.

    Raises:
        CheckpointError: The family is not declared and cannot be probed.
        ShapeError: They cannot be taken out of it; the message names the constraint.
    """
    return Gates(model, "hidden")


def neurons(model: PreTrainedModel) -> Gates:
    """Return gates on the neurons of a model's feed-forwards.

    Raises:
        CheckpointError: The family is not declared.
    """
    return Gates(model, "neurons")


def _anchor(place: UnitGroup) -> object:
    """Return what stays the same of a place when blocks before it go."""
    return place.module if isinstance(place, Site) else place.name


def _ranker(ranker: str | Ranker, settings: dict[str, Any]) -> Ranker:
    if isinstance(ranker, Ranker):
        return ranker
    known = rankers()
    if ranker not in known:
        raise ConfigError(f"ranker: {ranker!r} is none. Choose: {', '.join(known)}.")
    try:
        return known[ranker](**settings)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigError(f"ranker {ranker}: {'; '.join(lines)}") from error
