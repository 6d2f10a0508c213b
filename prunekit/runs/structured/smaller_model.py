"""The smaller model of a structured run, without weights in memory.

Units are removed from an empty model; its checkpoint cuts each tensor when it is read. After each
removal both can be run block by block like any model and its checkpoint.
"""

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from prunekit.architectures import find_architecture
from prunekit.models.empty_model import empty_model
from prunekit.models.layout import stack_runners
from prunekit.models.load import tie_as_stored
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.units.base import Kept
from prunekit.models.units.find import unit_groups
from prunekit.models.units.kinds import WHOLE, Kind
from prunekit.models.units.replay import Replay
from prunekit.models.units.stored_removal import cut_checkpoint
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.structured.written import config_changes
from prunekit.structured.finalize import describe

Removals = Iterable[tuple[Kind, Kept]]
"""Kinds in the order of their removal, each with the kept units of its groups, by the names that
the groups have then."""


class SmallerModel:
    """The model of a plan without some of its units.

    Attributes:
        model: The model on the meta device; weights that are tied are one parameter.
        checkpoint: Its weights, cut when they are read, and its config. A tensor whose values the
            removal changes is read in the type of the run; its entry has the type in which it is
            written.
        notes: How its config describes it after each removal, as in
            :class:`prunekit.structured.finalize.Finalized`.
    """

    def __init__(self, plan: StructuredPlan, removals: Removals = ()) -> None:
        """Remove units of one kind after the other.

        Raises:
            ConfigError: See :func:`prunekit.structured.finalize.describe`.
            ShapeError: As above; or a tensor that has to be cut is a part of another one.
        """
        self._plan = plan
        self.model, self.checkpoint = empty_model(plan.checkpoint), plan.checkpoint
        self.tie()
        self.notes: list[str] = []
        self._config_before = self.model.config.to_dict()
        self._kept_blocks: Kept = {}
        self._replays: list[dict[str, Replay]] = []
        for kind, kept in removals:
            self._remove(kind, kept)

    def tie(self) -> None:
        """Tie weights again, which are separate once they were loaded and dropped."""
        stored = self._plan.stored
        pairs = self.model.all_tied_weights_keys.items()
        held = ({stored[name], stored[other]} for name, other in pairs)
        twice = {name for names in held if len(names) == 2 for name in names}
        tie_as_stored(self.model, stored, self._plan.checkpoint.read(twice))

    @property
    def stacks(self) -> list[StackRunner]:
        """Runners of its block stacks."""
        return stack_runners(self.model, find_architecture(self.model))

    def _remove(self, kind: Kind, kept: Kept) -> None:
        """Remove all other units of one kind.

        Args:
            kind: Kind of the units.
            kept: Kept units of each group, by the names that the groups have now.
        """
        plan, groups = self._plan, unit_groups(self.model, kind)
        entries, note = describe(self.model, groups, kept, stock=plan.config.prune.uniform)
        cut, replays = cut_checkpoint(
            self.model, self.checkpoint, groups, kept, entries, plan.dtype
        )
        self.notes.append(note)
        if kind == "blocks":
            self._kept_blocks = kept
        if kind not in WHOLE:
            self._replays.append(replays)
        after = self.model.config.to_dict()
        changed, dropped = config_changes(plan, self._config_before, after, self._kept_blocks)
        config = plan.checkpoint.config | changed
        config = {key: value for key, value in config.items() if key not in dropped}
        self.checkpoint = replace(cut, config=config)

    def cut(self, name: str, whole: Tensor) -> Tensor | None:
        """Return a tensor without the removed heads and neurons.

        Args:
            name: Its name in the model.
            whole: The tensor with all heads and neurons, without removed blocks and coordinates.

        Returns:
            Its part, or None if it is removed as a whole.
        """
        for replays in self._replays:
            if name not in replays:
                return None
            whole = replays[name].of(whole)
        return whole

    def put_back(self, name: str, part: Tensor) -> Tensor:
        """Return the tensor of which :meth:`cut` returned a part, 0 elsewhere."""
        for replays in reversed(self._replays):
            part = replays[name].put_back(part)
        return part
