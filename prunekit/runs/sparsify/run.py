"""Prune weights block by block: a run as a stream of records.

Calibrate, evaluate, prune, write, verify, report. Nothing is printed here: progress bar, journal
and report are readers of the same records.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from typing_extensions import override

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.errors import StoppedError
from prunekit.evaluation.verify import make_proof, recount_zeros
from prunekit.models.layout import Block
from prunekit.models.sequential.hidden_states import hidden_states_factory
from prunekit.models.sequential.loaded_block import LoadedBlock
from prunekit.models.sequential.pipeline import OutputsRead, iterate_blocks, load_blocks
from prunekit.models.sequential.weights import Weights
from prunekit.reports import environment
from prunekit.runs.base import RunBase
from prunekit.runs.record import Record
from prunekit.runs.sparsify import result as results
from prunekit.runs.sparsify.block_output import BlockOutput, PrunedBlock
from prunekit.runs.sparsify.plan import Plan
from prunekit.runs.sparsify.shards import LayerRecord, ShardWriter, compressed_layouts
from prunekit.runs.stage import Stage
from prunekit.runs.texts import Data, own_batches
from prunekit.sparsify.block_pruner import BlockPruner, CalibratedStages
from prunekit.sparsify.calibrate import make_survey
from prunekit.sparsify.permute_channels import channel_orders, permute_channels
from prunekit.sparsify.permute_residual import residual_order, residual_views


def run(
    plan: Plan,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """Carry out a plan and yield its records as they are measured.

    Args:
        plan: The plan, from :func:`prunekit.plan`.
        resume: Continue the run that the output folder holds.
        overwrite: Delete an earlier run in the output folder.
        stop: Called after each block; where it returns True on one rank, all stop.
    """
    yield from SparsifyRun(plan, stop).records(resume=resume, overwrite=overwrite)


class SparsifyRun(RunBase[Plan]):
    """One run and its measurements so far."""

    def __init__(self, plan: Plan, stop: Callable[[], bool] = lambda: False) -> None:
        super().__init__(plan, len(plan.blocks) + 1, plan.ranks)
        plan = self.plan
        self.stop = stop
        self.ranks.traffic.clear()
        self.weights = Weights(plan.model, plan.checkpoint, plan.dtype, plan.device)
        self.shards = ShardWriter(plan, self.weights, self.output)
        self.writes += self.shards.adapter_files
        self.layers: list[LayerRecord] = []
        self.written = BlockOutput(self.shards, self.output, self._block_record)

    @override
    def records(self, *, resume: bool, overwrite: bool) -> Iterator[Record]:
        """Yield the records of the whole run."""
        try:
            yield from self._records(resume=resume, overwrite=overwrite)
        finally:
            self.written.close()

    def _records(self, *, resume: bool, overwrite: bool) -> Iterator[Record]:
        plan = self.plan
        tokens, evaluated = self._begin(resume=resume, overwrite=overwrite)
        count = tokens.tokens if tokens else 0
        blocks, linears = len(plan.blocks), len(plan.sizes)
        yield Record(
            "start", "", {"blocks": blocks, "linears": linears, "tokens": count}, Stage.CALIBRATING
        )
        yield from self._evaluate("before", evaluated)
        sparsities = yield from self._allocate(tokens)
        yield from self._prune(tokens, sparsities)
        yield Record("phase", "export", {"steps": 1}, Stage.EXPORTING)
        with self._timed("write"):
            self.ranks.run_on_main(lambda: self.shards.finish(self.layers, self.dtype))
        yield from self._evaluate("after", evaluated)
        yield Record("phase", "verify", {"steps": 1}, Stage.VERIFYING)
        peaks = self.ranks.all_gather_object(environment.peak_memory(plan.device))
        sent = self.ranks.all_gather_object(dict(self.ranks.traffic))
        report = self.ranks.run_on_main(lambda: self._verify(tokens, peaks, sent))
        yield Record("finish", str(self.output.folder), report)

    def _allocate(self, tokens: Data | None) -> Iterator[Record]:
        """Yield progress and return the sparsity of each linear."""
        plan, allocation = self.plan, self.plan.config.prune.allocation
        known = self.output.journal.get(("allocation", allocation.name))
        if known is None:
            if allocation.surveys:
                yield Record("phase", "survey", {"steps": len(plan.blocks)}, Stage.SCORING)
            reads: OutputsRead = "all" if allocation.needs else "none"
            with self._timed("calibrate"):
                survey = make_survey(
                    lambda: self._iterate(tokens, reads), allocation, plan.recipe.pattern
                )
                found = allocation.allocate(plan.sizes, survey, plan.config.prune.sparsity)
                known = self.ranks.run_on_main(lambda: found)
            self.output.append_journal("allocation", allocation.name, known)
        return known

    def _iterate(
        self, tokens: Data | None, outputs_read: OutputsRead, *, with_dense: bool = False
    ) -> Iterator[tuple[LoadedBlock, Block]]:
        """Iterate over all blocks with this rank's samples, or one token."""
        plan = self.plan
        one = {"input_ids": torch.zeros(1, 1, dtype=torch.int64, device=plan.device)}
        batches = own_batches(tokens, plan.device, self.ranks) if tokens else [one]
        factory = hidden_states_factory(plan.memory.where, plan.device, self.output.folder)
        loaded = iterate_blocks(
            plan.model,
            plan.stacks,
            self.weights,
            batches,
            self.ranks,
            with_dense=with_dense,
            outputs_read=outputs_read,
            new_hidden_states=factory,
        )
        return zip(loaded, plan.blocks, strict=True)

    def _prune(self, tokens: Data | None, sparsities: Mapping[str, float]) -> Iterator[Record]:
        """Prune all blocks and write their shards."""
        plan, recipe, done = self.plan, self.plan.recipe, self.output.journal
        if {("rest", ""), *(("block", block.name) for block in plan.blocks)} <= done.keys():
            yield Record("phase", "prune", {"steps": len(plan.blocks)}, Stage.PRUNING)
            for number, block in enumerate(plan.blocks):
                yield from self._restored_records(number, done["block", block.name])
            return
        if plan.axes:
            yield from self._permute_residual(tokens)
        yield Record("phase", "prune", {"steps": len(plan.blocks)}, Stage.PRUNING)
        with self._timed("write"):
            self.shards.write_rest()
        pruner = BlockPruner(recipe, sparsities, plan.stored)
        if recipe.blocks_independent:
            yield from self._prune_independently(tokens, pruner)
            return
        began = time.perf_counter()
        blocks = self._iterate(tokens, recipe.outputs_read, with_dense=recipe.runs_dense_model)
        for number, (loaded, block) in enumerate(blocks):
            values = self.output.journal.get(("block", block.name))
            if values is None:
                yield from self._prune_block(pruner, number, loaded, began)
            else:
                yield from self._written()
                permute_channels(loaded, values["orders"])
                self.shards.restore_block(loaded, number, values["layers"])
                yield from self._restored_records(number, values)
            try:
                self._check_ranks(block.name, stop=self.stop())
            except StoppedError:
                yield from self._written()
                raise
            began = time.perf_counter()
        yield from self._written()

    def _prune_block(
        self, pruner: BlockPruner, number: int, loaded: LoadedBlock, began: float
    ) -> Iterator[Record]:
        """Prune a block; write it once the last one is written."""
        block = self.plan.blocks[number]
        orders, pruned = channel_orders(loaded, block, self.plan.recipe), []
        permute_channels(loaded, orders)
        for result in pruner.prune(loaded, block):
            pruned.append(result)
            self.written.add(number, result)
            yield from self.written.ready()
        seconds = time.perf_counter() - began
        yield from self._written()
        self.written.write(PrunedBlock(number, loaded, pruned, orders, seconds))
        yield from self.written.ready()

    def _written(self) -> Iterator[Record]:
        """Wait for the block that is being written; yield its records."""
        yield from self._timed_records("write", self.written.finish())

    def _permute_residual(self, tokens: Data | None) -> Iterator[Record]:
        """Permute the residual stream in all tensors read from the checkpoint."""
        plan = self.plan
        known = self.output.journal.get(("order", "residual"))
        if known is None:
            yield Record("phase", "survey", {"steps": len(plan.blocks)}, Stage.SCORING)
            with self._timed("calibrate"):
                blocks = self._iterate(tokens, "all")
                order = residual_order(blocks, plan.blocks, plan.axes, plan.recipe, self.ranks)
            known = {"order": order}
            self.output.append_journal("order", "residual", known)
        if known["order"]:
            views = residual_views(known["order"], plan.axes, self.weights.stored)
            self.weights.checkpoint = replace(plan.checkpoint, views=views)

    def _prune_independently(self, tokens: Data | None, pruner: BlockPruner) -> Iterator[Record]:
        """Prune independent blocks; each rank prunes and writes its own.

        In a round each rank prunes one block; then the journal gets the blocks of all.
        """
        ranks, blocks, done = self.ranks, self.plan.blocks, self.output.journal
        todo = [number for number, block in enumerate(blocks) if ("block", block.name) not in done]
        for number in sorted(set(range(len(blocks))) - set(todo)):
            yield from self._restored_records(number, done["block", blocks[number].name])
        own, needs = todo[ranks.rank :: ranks.size], bool(self.plan.recipe.needs)
        loaded_blocks = self._independent_blocks(tokens, own)

        def advance_to(number: int) -> LoadedBlock:
            return next(loaded for at, loaded in loaded_blocks if at == number)

        for start in range(0, len(todo), ranks.size):
            began, turn = time.perf_counter(), todo[start : start + ranks.size]
            reached = ((at, advance_to(at)) for at in turn if at in own or needs)
            mine = self._calibrate_round(pruner, reached, own)
            values = mine and self._prune_own(pruner, mine, began)
            found = [each for each in ranks.all_gather_object(values) if each]
            for number, each in zip(turn, found, strict=True):
                self.output.append_journal("block", blocks[number].name, each)
                yield from self._restored_records(number, each)
            self._check_ranks(blocks[turn[-1]].name, stop=self.stop())
        self.layers.sort(key=lambda layer: layer["block"])

    def _independent_blocks(
        self, tokens: Data | None, own: list[int]
    ) -> Iterator[tuple[int, LoadedBlock]]:
        """Yield numbered blocks: all with dense inputs or, without statistics, only ``own``."""
        if self.plan.recipe.needs:
            loaded = self._iterate(tokens, self.plan.recipe.outputs_read)
            yield from ((number, each) for number, (each, _) in enumerate(loaded))
        else:
            yield from zip(own, load_blocks(self.plan.stacks, self.weights, own), strict=True)

    def _calibrate_round(
        self, pruner: BlockPruner, reached: Iterable[tuple[int, LoadedBlock]], own: list[int]
    ) -> tuple[int, LoadedBlock, CalibratedStages] | None:
        """Gather statistics of a round's blocks; return this rank's own block.

        All come before any is pruned: ranks wait for each other where statistics are summed.
        """
        mine = None
        for number, loaded in reached:
            stages = pruner.calibrate(loaded, self.plan.blocks[number])
            loaded.checks.settle()
            if number in own:
                mine = number, loaded.detached(), stages
        return mine

    def _prune_own(
        self, pruner: BlockPruner, mine: tuple[int, LoadedBlock, CalibratedStages], began: float
    ) -> dict[str, Any]:
        """Prune and write this rank's block; return its journal values."""
        number, loaded, stages = mine
        pruned = [each.arrived() for each in pruner.prune(loaded, self.plan.blocks[number], stages)]
        loaded.checks.settle()
        with self._timed("write"):
            values = self.shards.write_block(number, loaded, pruned, writes=True)
        values |= {"seconds": time.perf_counter() - began, "orders": {}}
        return values | self.weights_read.take()

    def _restored_records(self, number: int, values: dict[str, Any]) -> Iterator[Record]:
        """Yield the records of a block from its journal values."""
        for layer in values["layers"]:
            yield Record("layer", layer["name"], layer)
        yield self._block_record(number, values)

    def _block_record(self, number: int, values: dict[str, Any]) -> Record:
        """Add a block to the report and return its record."""
        self.layers += values["layers"]
        self.seconds["prune"] += values["seconds"]
        facts = {"index": number, "seconds": values["seconds"], "file": values["file"]}
        return Record("block", self.plan.blocks[number].name, facts)

    def _verify(
        self, tokens: Data | None, peaks: list[dict[str, int]], sent: list[dict[str, int]]
    ) -> dict[str, Any]:
        """Verify the checkpoint; write and return the report."""
        plan = self.plan
        with self._timed("verify"):
            written = open_checkpoint(self.output.folder)
            proof = make_proof(written, plan.device)
            counted = recount_zeros(written, self.layers, plan.recipe.pattern, plan.device)
        frame, layouts = self._report_frame(tokens, proof), compressed_layouts(self.layers)
        report = results.report(plan, frame, self.output, self.layers, layouts, counted)
        if self.ranks.is_distributed:
            report["ranks"] = [
                {**peak, "sent_bytes": bytes_} for peak, bytes_ in zip(peaks, sent, strict=True)
            ]
        return self._write_report(report)
