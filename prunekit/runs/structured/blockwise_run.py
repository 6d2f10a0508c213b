"""Structured run with one block of weights in memory.

First all units are ranked, in passes over the blocks; the decision is journaled. Then the blocks
are loaded again one by one, compensated, cut and written as shards, so that a stopped run goes on
with the next block.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor
from typing_extensions import override

from prunekit.models.sequential.hidden_states import HiddenStatesFactory, hidden_states_factory
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.models.sequential.pipeline import iterate_blocks
from prunekit.models.sequential.weights import Weights
from prunekit.models.units.find import unit_groups
from prunekit.models.units.heads_neurons import LinearUnitGroup
from prunekit.models.units.kinds import WHOLE, Kind
from prunekit.models.units.removal import count_parameters
from prunekit.runs.record import Record
from prunekit.runs.stage import Stage
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.structured.ranking import UnitRanking
from prunekit.runs.structured.shards import UnitShards
from prunekit.runs.structured.smaller_model import SmallerModel
from prunekit.runs.structured.unit_run import UnitRun, run_order
from prunekit.runs.structured.unit_scorer import BlockwiseScorer
from prunekit.runs.texts import Data, own_batches
from prunekit.structured.blockwise_refit import compensate_block, removed_readers
from prunekit.structured.finalize import STOCK, linear_groups_of

Removals = list[tuple[Kind, dict[str, list[int]]]]
"""Kinds in the order of their removal, each with its kept units."""


class CompensatedBlock(NamedTuple):
    """A block, if loaded, and its changed tensors by name."""

    loaded: LoadedBlock | None = None
    changed: Mapping[str, Tensor] | None = None


class BlockwiseRun(UnitRun):
    """A run that removes units from one model, block by block."""

    def __init__(self, plan: StructuredPlan) -> None:
        super().__init__(plan)
        self._shards: UnitShards | None = None

    @override
    def _remove_units(self, tokens: Data | None) -> Iterator[Record]:
        """Rank units, then cut the blocks and write them."""
        smaller = yield from self._ranked(tokens)
        with self._timed("write"):
            shards = self._shards = UnitShards(self.plan, smaller, self.output)
            shards.begin()
        blocks, how = self._compensated(tokens), self.plan.config.prune.compensate
        yield Record(
            "phase", how if blocks else "write", {"steps": len(shards.blocks)}, Stage.PRUNING
        )
        for number, name in enumerate(shards.blocks):
            with self._timed("prune" if blocks else "write"):
                loaded = next(blocks) if blocks else CompensatedBlock()
            if ("block", name) not in self.output.journal:
                with self._timed("write"):
                    values = shards.write_block(number, *loaded)
                self.output.append_journal("block", name, values)
            del loaded  # or its tensors would be held beside those of the next block
            yield Record("step", name)

    @override
    def _finish(self, removal: dict[str, Any]) -> None:
        assert self._shards is not None
        self._shards.finish(self.dtype)

    def _ranked(self, tokens: Data | None) -> Generator[Record, None, SmallerModel]:
        """Return the smaller model, ranking units unless that was done."""
        known = self.output.journal.get(("shrunk", ""))
        if known is None:
            return (yield from self._rank(tokens))
        return SmallerModel(self.plan, known["removals"])

    def _rank(self, tokens: Data | None) -> Generator[Record, None, SmallerModel]:
        """Rank the units of an empty model; journal which are removed.

        Returns:
            The model without them.
        """
        plan = self.plan
        with self._timed("calibrate"):
            scorer = BlockwiseScorer(
                batches=own_batches(tokens, plan.device, self.ranks) if tokens else [],
                whole=own_batches(tokens, plan.device) if tokens else [],
                ranks=self.ranks,
                plan=plan,
                new_hidden_states=self._hidden_states,
            )
        with ExitStack() as stack:
            ranking = UnitRanking(plan, scorer, stack, self._timed)
            gates, _ = yield from ranking.rank()
            self.weights_read.require_same(self.ranks)
            removals = [*scorer.removals, *((each.kind, each.kept) for each in gates)]
        smaller = SmallerModel(plan, removals)
        facts = {
            "layers": [ranking.entries[name] for name in run_order(scorer.model, ranking.entries)],
            "parameters": [plan.parameters, count_parameters(smaller.model)],
            "stock": all(note == STOCK for note in smaller.notes),
            "note": next((note for note in smaller.notes if note != STOCK), STOCK),
            "views": ranking.views,
            "training": None,
            "agreement": ranking.agreement,
            "removals": removals,
        }
        self.output.append_journal("shrunk", "", facts)
        return smaller

    def _compensated(self, tokens: Data | None) -> Iterator[CompensatedBlock] | None:
        """Return the blocks, compensated for removed units; None if none needs that."""
        removals: Removals = self.output.journal["shrunk", ""]["removals"]
        if self.plan.config.prune.compensate == "none" or tokens is None:
            return None
        linear = any(kind not in WHOLE for kind, _ in removals)
        return self._compensated_blocks(removals, tokens) if linear else None

    def _compensated_blocks(self, removals: Removals, tokens: Data) -> Iterator[CompensatedBlock]:
        """Yield each block, compensated, and its changed tensors."""
        plan, how, shards = self.plan, self.plan.config.prune.compensate, self._shards
        assert shards is not None
        whole = SmallerModel(plan, [each for each in removals if each[0] in WHOLE])
        linear = [each for each in removals if each[0] not in WHOLE]
        kept = {name: units for _, each in linear for name, units in each.items()}
        readers = removed_readers(
            linear_groups_of(
                [group for kind, _ in linear for group in unit_groups(whole.model, kind)]
            ),
            kept,
        )
        weights = Weights(whole.model, whole.checkpoint, plan.dtype, plan.device)
        blocks = iterate_blocks(
            whole.model,
            whole.stacks,
            weights,
            own_batches(tokens, plan.device, self.ranks),
            self.ranks,
            new_hidden_states=self._hidden_states,
        )
        for number, block in enumerate(blocks):
            if ("block", block.name) in self.output.journal:
                shards.restore_block(block, number)
                yield CompensatedBlock(block)
            else:
                inside = compensate_block(block, readers, kept, how)
                yield CompensatedBlock(block, _changed(block, inside))

    @property
    def _hidden_states(self) -> HiddenStatesFactory:
        return hidden_states_factory(self.plan.where, self.plan.device, self.output.folder)


def _changed(block: LoadedBlock, groups: Sequence[LinearUnitGroup]) -> dict[str, Tensor]:
    """Return the tensors of the linears that were compensated."""
    names = {module: name for name, module in block.module.named_modules(prefix=block.name)}
    return {
        f"{names[group.reader.linear]}.{name}": parameter
        for group in groups
        for name, parameter in group.reader.linear.named_parameters()
    }
