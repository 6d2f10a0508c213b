"""Scoring, pruning and removal of units of a model in memory.

    heads = prunekit.heads(model)
    heads.prune(heads.score("output-norm", tokens), 0.3)
    heads.finalize()

Until ``finalize`` the model's weights are unchanged, and ``undo`` reverts each step. Layers and
units are counted from 0; a layer is an index into ``heads.groups``.

Shapes: U units of a group.
"""

from dataclasses import replace
from typing import Any, cast

from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.allocations.schedules import linear as linear_schedule
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError, PrunekitError
from prunekit.models.units.heads_neurons import LinearUnitGroup
from prunekit.models.units.kinds import Kind
from prunekit.structured.agreement import redundancy
from prunekit.structured.batches import Batch, Data, eval_mode, to_batches
from prunekit.structured.finalize import Finalized, finalize
from prunekit.structured.gate_set import GateSet, attached_gates
from prunekit.structured.rankers import GatedModel, Ranker, Scores, rankers
from prunekit.structured.refit import reader_grams
from prunekit.structured.selection import (
    RemovedUnit,
    UnitScope,
    check_finite,
    check_whole,
    select_units,
)


class Gates(GateSet):
    """Gates on all units of one kind, with scoring and pruning."""

    def score(
        self,
        ranker: str | Ranker,
        data: Data | None = None,
        *,
        ranks: Ranks = SINGLE,
        **settings: Any,  # noqa: ANN401
    ) -> Scores:
        """Return the score of each unit with the current gates.

        Args:
            ranker: A ranker, or its name.
            data: Token ids [N, T] or batches; None for a ranker of weights alone.
            ranks: Processes with gates on the same model and other data.
            settings: Settings of a ranker given by name.

        Raises:
            ConfigError: The ranker or a setting is unknown, the ranker does not rank this kind, or
                the data lacks an input.
        """
        chosen = _ranker(ranker, settings)
        for component in chosen.components:
            if self.kind not in component.kinds:
                ranked = " and ".join(sorted(component.kinds))
                raise ConfigError(f"ranker {component.name}: it ranks {ranked}, not {self.kind}.")
        found = to_batches(data, self.model) if chosen.needs_data else []
        with eval_mode(self.model):
            return chosen.score(replace(self._gated_model(found), ranks=ranks))

    def prune(
        self,
        scores: Scores,
        sparsity: float,
        *,
        scope: UnitScope = "global",
        least: int = 1,
        round_to: int = 1,
    ) -> list[RemovedUnit]:
        """Close the gates of the units with the lowest scores.

        Args:
            scores: Score of each unit, by group name.
            sparsity: Fraction of all units that is pruned afterwards.
            scope: "global" or "layer"; see :func:`prunekit.structured.selection.select_units`.
            least: Units that every layer keeps.
            round_to: Every width made up by the kept units is rounded up to a multiple of this,
                and of the heads where transformers divides the hidden size among them.

        Raises:
            ConfigError: The count is impossible, or a score is not a number.
        """
        check_whole("round_to", round_to)
        multiples = {group.name: group.unit_multiple(round_to) for group in self.groups}
        chosen = select_units(
            scores, self.keep, sparsity, scope=scope, least=least, multiples=multiples
        )
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
        scope: UnitScope = "global",
    ) -> list[RemovedUnit]:
        """Prune in several steps, with new scores in each.

        Two units with the same function each look useless while the other one is open. With as
        many steps as pruned units this is the greedy search. One ``undo`` reverts all steps; if one
        step fails, none is done.

        Args:
            ranker: The ranker.
            data: Token ids [N, T] or batches.
            sparsity: Fraction of all units that is pruned afterwards.
            steps: Number of steps; the sparsity rises linearly.
            scope: "global" or "layer".

        Raises:
            ConfigError: ``steps`` is below 1, or as in :meth:`score` and :meth:`prune`.
        """
        check_whole("steps", steps)
        units = sum(group.units for group in self.groups)
        start = sum(int((~keep).sum()) for keep in self.keep.values()) / units
        parts = [linear_schedule(step, steps, sparsity, start) for step in range(1, steps + 1)]
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

    def redundancy(self, data: Data) -> dict[str, Float[Tensor, "U U"]]:
        """Return the similarity of each pair of units, by group."""
        with eval_mode(self.model):
            grams = reader_grams(self._gated_model(to_batches(data, self.model)))
        return {group.name: redundancy(group, grams[group.name]) for group in self.linear_groups}

    def finalize(self, data: Data | None = None, *, stock: bool = False) -> Finalized:
        """Remove pruned units from the matrices.

        The output is that of the gated model. Factors of kept units are folded into the weights.
        New gates, all at 1, are attached to the remaining units.

        Args:
            data: Samples on which the reading linears are refitted, in run order, to their output
                with all units; the output is then closer to the dense model's.
            stock: Refuse, before any change, if a stock config cannot describe the new shapes.

        Raises:
            ConfigError: There is data but no linear to refit, or a gate is not finite, or neither
                open nor closed where no weight can absorb its factor.
            ShapeError: ``stock``, or the kind, needs a config that describes the new shapes, and
                there is none; the message names the constraint.
            CheckpointError: Blocks keep different heads, share a position bias, and this
                transformers computes their attention by itself.
        """
        for name, gate in self.gates.items():
            check_finite(f"{name}: gate", gate.factor)
        done = finalize(self.model, self.groups, self.gates, data, stock=stock)
        self._attach()
        return done

    def _gated_model(self, found: list[Batch]) -> GatedModel:
        # A ranker states the kinds that it ranks and uses only members that all of these have.
        groups = cast("list[LinearUnitGroup]", self.groups)
        return GatedModel(self.model, groups, self.gates, found)


def _gates(model: PreTrainedModel, kind: Kind) -> Gates:
    """Return the gates on one kind of units, attached or new."""
    attached = attached_gates(model, kind)
    return attached if isinstance(attached, Gates) else Gates(model, kind)


def heads(model: PreTrainedModel) -> Gates:
    """Return gates on the attention heads of a model.

    Under grouped queries a unit is a key head with all query heads that share it.

    Raises:
        ConfigError: It is no transformers model with its weights in memory.
        CheckpointError: The family is not declared.
    """
    return _gates(model, "heads")


def neurons(model: PreTrainedModel) -> Gates:
    """Return gates on the neurons of a model's feed-forwards.

    Raises:
        ConfigError: It is no transformers model with its weights in memory.
        CheckpointError: The family is not declared.
    """
    return _gates(model, "neurons")


def blocks(model: PreTrainedModel) -> Gates:
    """Return gates on whole blocks; a closed one passes its input through.

    Raises:
        ConfigError: It is no transformers model with its weights in memory.
        CheckpointError: The family is not declared and cannot be probed.
    """
    return _gates(model, "blocks")


def hidden(model: PreTrainedModel) -> Gates:
    """Return gates on the coordinates of a model's residual stream.

    Raises:
        ConfigError: It is no transformers model with its weights in memory.
        CheckpointError: The family is not declared and cannot be probed.
        ShapeError: Coordinates cannot be removed; the message names the constraint.
    """
    return _gates(model, "hidden")


def _ranker(ranker: str | Ranker, settings: dict[str, Any]) -> Ranker:
    """Return a ranker given by itself or by its name and settings."""
    if isinstance(ranker, Ranker):
        return ranker
    known = rankers()
    if not isinstance(ranker, str) or ranker not in known:
        raise ConfigError(f"ranker: {ranker!r} is none. Choose: {', '.join(known)}.")
    try:
        return known[ranker](**settings)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigError(f"ranker {ranker}: {'; '.join(lines)}") from error
