"""The main job as a stream of records: calibrate, judge, prune block by block, prove, report.

Nothing is printed here: progress bar, journal and report are readers of the same records.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from prunekit.checkpoint import adapter as lowrank
from prunekit.checkpoint.atomic import digest
from prunekit.checkpoint.compressed import layer_of, pack, unpack
from prunekit.checkpoint.formats import Stored, format_named
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.data.tokens import Tokens
from prunekit.errors import StoppedError
from prunekit.evaluation.verify import prove, recount
from prunekit.models.layout import Block, orientation
from prunekit.models.sequential.hidden_states import hidden_states_factory
from prunekit.models.sequential.pipeline import LoadedBlock, batches, iterate_blocks, load_blocks
from prunekit.models.sequential.weights import Weights
from prunekit.reports import environment
from prunekit.reports import report as reports
from prunekit.runs import facts as result_facts
from prunekit.runs.base import RunBase
from prunekit.runs.record import Record
from prunekit.runs.sparsify import result
from prunekit.runs.sparsify.plan import Plan
from prunekit.sparsify.block_pruner import BlockPruner, CalibratedStages, Outcome
from prunekit.sparsify.calibrate import survey
from prunekit.sparsify.permute_channels import Orders, orders, rearrange
from prunekit.sparsify.permute_residual import residual_order


def run(
    plan: Plan,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """Carry out a plan and yield what was measured, as it is measured.

    A run that was stopped, however, leaves a folder that ``resume`` goes on with; the weights are
    then the same bytes as those of a run that was not stopped. ``stop`` is asked after each block;
    where one rank says yes, all stop.

    Raises:
        StoppedError: So it was asked.
        PrunekitError: See each kind; the folder then stays resumable.
    """
    yield from SparsifyRun(plan, stop).records(resume=resume, overwrite=overwrite)


class SparsifyRun(RunBase[Plan]):
    """One run and what it has measured so far."""

    def __init__(self, plan: Plan, stop: Callable[[], bool] = lambda: False) -> None:
        super().__init__(plan, len(plan.blocks) + 1, plan.ranks)
        self.stop = stop
        self.ranks.traffic.clear()
        self.weights = Weights(plan.model, plan.checkpoint, plan.dtype, plan.device)
        self.format = format_named(plan.config.output.format)
        self.layers: list[dict[str, Any]] = []

    def records(self, *, resume: bool, overwrite: bool) -> Iterator[Record]:
        """Yield the records of the whole run."""
        try:
            yield from self._records(resume=resume, overwrite=overwrite)
        finally:
            self.output.close()

    def _records(self, *, resume: bool, overwrite: bool) -> Iterator[Record]:
        plan = self.plan
        tokens, judged = self._begin(resume=resume, overwrite=overwrite)
        count = tokens.ids.numel() if tokens else 0
        blocks, linears = len(plan.blocks), len(plan.sizes)
        yield Record("start", "", {"blocks": blocks, "linears": linears, "tokens": count})
        yield from self._evaluate("before", judged)
        sparsities = yield from self._allocate(tokens)
        yield from self._prune(tokens, sparsities)
        with self._timed("write"):
            self.ranks.run_on_main(self._finish)
        yield from self._evaluate("after", judged)
        yield Record("phase", "verify", {"steps": 1})
        peaks = self.ranks.all_gather_object(environment.peak_memory(plan.device))
        sent = self.ranks.all_gather_object(dict(self.ranks.traffic))
        report = self.ranks.run_on_main(lambda: self._prove(tokens, peaks, sent))
        yield Record("finish", str(self.output.folder), report)

    def _finish(self) -> None:
        if self.plan.recipe.recover == "lowrank":
            linears = [self.plan.model.get_submodule(linear.name) for linear in self.plan.linears]
            transposed = any(orientation(linear)[2] for linear in linears)
            names = [block.name for block in self.plan.blocks]
            lowrank.finish(self.output.folder, names, transposed=transposed)
        self.output.finish(self.plan.checkpoint, self.dtype, self.format, self._compressed())

    def _prove(
        self, tokens: Tokens | None, peaks: list[dict[str, int]], sent: list[dict[str, int]]
    ) -> dict[str, Any]:
        """Look at what was written, and write and return the report."""
        with self._timed("verify"):
            written = open_checkpoint(self.output.folder)
            proof = prove(written, self.plan.device)
            counted = recount(written, self.layers, self.plan.recipe.pattern)
        report = self._report(tokens, counted, proof)
        if self.ranks.is_distributed:
            report["ranks"] = [
                {**peak, "sent_bytes": bytes_} for peak, bytes_ in zip(peaks, sent, strict=True)
            ]
        reports.write(report, self.output.folder)
        self.output.note("finish", "", {"seconds": report["seconds"]["total"]})
        return report

    def _compressed(self) -> dict[str, Stored]:
        """Return what is said of the compressed linears, by name."""
        return {
            layer_of(layer["tensor"]): Stored(*layer["stored"])
            for layer in self.layers
            if "stored" in layer
        }

    def _allocate(self, tokens: Tokens | None) -> Iterator[Record]:
        """Yield progress and return the sparsity of each linear."""
        plan, allocation = self.plan, self.plan.config.prune.allocation
        known = self.output.done.get(("allocation", allocation.name))
        if known is None:
            if allocation.surveys:
                yield Record("phase", "survey", {"steps": len(plan.blocks)})
            with self._timed("calibrate"):
                look = survey(lambda: self._visits(tokens), allocation, plan.recipe.pattern)
                found = allocation.allocate(plan.sizes, look, plan.config.prune.sparsity)
                known = self.ranks.run_on_main(lambda: found)
            self.output.note("allocation", allocation.name, known)
        return known

    def _visits(
        self, tokens: Tokens | None, *, beside: bool = False
    ) -> Iterator[tuple[LoadedBlock, Block]]:
        """Visit every block with this rank's tokens, or with one token where none is needed."""
        plan = self.plan
        ids = torch.zeros(1, 1, dtype=torch.int64)
        if tokens:
            ids = tokens.ids[self.ranks.shard(len(tokens.ids))]
        parts = batches(ids, plan.device)
        place = hidden_states_factory(plan.memory.where, plan.device, self.output.folder)
        visits = iterate_blocks(
            plan.model, plan.stacks, self.weights, parts, self.ranks, beside=beside, shelf=place
        )
        return zip(visits, plan.blocks, strict=True)

    def _prune(self, tokens: Tokens | None, sparsities: Mapping[str, float]) -> Iterator[Record]:
        plan = self.plan
        if plan.axes:
            yield from self._reorder(tokens)
        yield Record("phase", "prune", {"steps": len(plan.blocks)})
        with self._timed("write"):
            self._write_rest()
        pruner = BlockPruner(plan.recipe, sparsities, plan.stored)
        if plan.recipe.blocks_independent:
            yield from self._prune_apart(tokens, pruner)
            return
        began = time.perf_counter()
        visits = self._visits(tokens, beside=plan.recipe.runs_dense_model)
        for number, (visit, block) in enumerate(visits):
            # Nobody reads what the last block of the last stack gives.
            visit.propagates = bool(plan.recipe.needs) and number + 1 < len(plan.blocks)
            known = self.output.done.get(("block", block.name))
            if known is None:
                found, outcomes = orders(visit, block, plan.recipe), []
                rearrange(visit, found)
                for outcome in pruner.prune(visit, block):
                    outcomes.append(outcome)
                    yield Record("layer", outcome.linear.name, self._entry(outcome, number))
                took = time.perf_counter() - began
                writes = self.ranks.is_main
                known = self._write_block(number, visit, outcomes, found, writes=writes)
                known |= {"seconds": took, "orders": found}
                self.output.note("block", block.name, known)
            else:
                rearrange(visit, known["orders"])
                self._restore_block(visit, block, number, known["layers"])
                for entry in known["layers"]:
                    yield Record("layer", entry["name"], entry)
            yield self._block_record(number, known)
            self._stop_if_asked(block)
            began = time.perf_counter()

    def _reorder(self, tokens: Tokens | None) -> Iterator[Record]:
        """Let the checkpoint be read with the coordinates of its residual stream in order."""
        plan = self.plan
        known = self.output.done.get(("order", "residual"))
        if known is None:
            yield Record("phase", "survey", {"steps": len(plan.blocks)})
            with self._timed("calibrate"):
                visits = self._visits(tokens)
                found = residual_order(visits, plan.blocks, plan.axes, plan.recipe, self.ranks)
            known = {"order": found}
            self.output.note("order", "residual", known)
        if known["order"]:
            moved = {self.weights.stored[name]: axis for name, axis in plan.axes.items()}
            self.weights.checkpoint = replace(plan.checkpoint, moved=moved, order=known["order"])

    def _prune_apart(self, tokens: Tokens | None, pruner: BlockPruner) -> Iterator[Record]:
        """Deal out blocks, none of which waits for another to be pruned: each rank writes its own.

        After every round the first rank notes what all did.
        """
        ranks, blocks, done = self.ranks, self.plan.blocks, self.output.done
        todo = [at for at, block in enumerate(blocks) if ("block", block.name) not in done]
        for number in sorted(set(range(len(blocks))) - set(todo)):
            yield from self._layer_records(number, done["block", blocks[number].name])
        own, needs = todo[ranks.rank :: ranks.size], bool(self.plan.recipe.needs)
        visits = self._visits_apart(tokens, own)

        def reach(number: int) -> LoadedBlock:
            return next(visit for at, visit in visits if at == number)

        for start in range(0, len(todo), ranks.size):
            began, turn = time.perf_counter(), todo[start : start + ranks.size]
            mine = self._look(pruner, ((at, reach(at)) for at in turn if at in own or needs), own)
            known = mine and self._prune_own(pruner, mine, began)
            found = [values for values in ranks.all_gather_object(known) if values]
            for number, values in zip(turn, found, strict=True):
                self.output.note("block", blocks[number].name, values)
                yield from self._layer_records(number, values)
            self._stop_if_asked(blocks[turn[-1]])
        self.layers.sort(key=lambda layer: layer["block"])

    def _look(
        self, pruner: BlockPruner, visits: Iterable[tuple[int, LoadedBlock]], own: list[int]
    ) -> tuple[int, LoadedBlock, CalibratedStages] | None:
        """Gather what the blocks of a turn read, and return the one that is ours to prune.

        They are all gathered before: others would wait for us where sums are added up.
        """
        mine = None
        for number, visit in visits:
            looked = [*pruner.calibrate(visit, self.plan.blocks[number])]
            if number in own:
                mine = number, visit.detached(), looked
        return mine

    def _prune_own(
        self, pruner: BlockPruner, mine: tuple[int, LoadedBlock, CalibratedStages], began: float
    ) -> dict[str, Any]:
        number, visit, looked = mine
        outcomes = [*pruner.prune(visit, self.plan.blocks[number], looked)]
        known = self._write_block(number, visit, outcomes, writes=True)
        return known | {"seconds": time.perf_counter() - began, "orders": {}}

    def _visits_apart(
        self, tokens: Tokens | None, own: list[int]
    ) -> Iterator[tuple[int, LoadedBlock]]:
        """Visit all blocks with what the dense model gives them; where nothing is read, our own."""
        if not self.plan.recipe.needs:
            yield from zip(own, load_blocks(self.plan.stacks, self.weights, own), strict=True)
            return
        for number, (visit, _) in enumerate(self._visits(tokens)):
            visit.propagates = number + 1 < len(self.plan.blocks)
            yield number, visit

    def _layer_records(self, number: int, known: dict[str, Any]) -> Iterator[Record]:
        for entry in known["layers"]:
            yield Record("layer", entry["name"], entry)
        yield self._block_record(number, known)

    def _block_record(self, number: int, known: dict[str, Any]) -> Record:
        """Take a block into the report."""
        self.layers += known["layers"]
        self.seconds["prune"] += known["seconds"]
        facts = {"index": number, "seconds": known["seconds"], "file": known["file"]}
        return Record("block", self.plan.blocks[number].name, facts)

    def _stop_if_asked(self, block: Block) -> None:
        if any(self.ranks.all_gather_object(self.stop())):
            raise StoppedError(f"Stopped as asked, after {block.name}.")

    def _write_rest(self) -> None:
        """Write the first shard: what lies outside the blocks, as it is."""
        if ("rest", "") in self.output.done or not self.ranks.is_main:
            return
        inside = {name for block in self.plan.blocks for name in self._names(block)}
        names = [name for name in self.plan.checkpoint.entries if name not in inside]
        shard = self.output.write(1, self._stored(names))
        self.output.note("rest", "", {"file": shard.name, "sha256": digest(shard)})

    def _names(self, block: Block) -> list[str]:
        """Return the names that a block's tensors have in the checkpoint."""
        prefix = f"{block.name}."
        return [stored for name, stored in self.weights.stored.items() if name.startswith(prefix)]

    def _stored(self, names: list[str]) -> dict[str, Tensor]:
        tensors = self.weights.checkpoint.read(names)
        if self.plan.config.model.dtype == "auto":
            return tensors
        dtype = getattr(torch, self.plan.config.model.dtype)
        return {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }

    def _write_block(
        self,
        number: int,
        visit: LoadedBlock,
        outcomes: list[Outcome],
        found: Orders | None = None,
        *,
        writes: bool,
    ) -> dict[str, Any]:
        """Pack what was pruned, write it where that is ours, and return what to note of it.

        Its channels stand in the orders ``found``.
        """
        block = self.plan.blocks[number]
        with self._timed("write"):
            layers, packed = [self._entry(outcome, number) for outcome in outcomes], {}
            for layer, outcome in zip(layers, outcomes, strict=True):
                name, transposed = layer["tensor"], layer["transposed"]
                tensors, stored = pack(self.format, name, outcome.weight, transposed=transposed)
                packed |= tensors
                if stored:
                    layer["stored"] = stored.dump()
            # The others go on; should it not get written, they hear of it where they wait next.
            known: dict[str, Any] = {"file": self.output.shard(number + 2).name, "layers": layers}
            if writes:
                self._write_adapters(block, outcomes)
                pruned = {layer["tensor"] for layer in layers}
                others = self._stored([name for name in self._names(block) if name not in pruned])
                others |= self._moved(visit, block, found or {}, others)
                known["sha256"] = digest(self.output.write(number + 2, others | packed))
        return known

    def _moved(
        self, visit: LoadedBlock, block: Block, found: Orders, others: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return those that were not pruned with their channels in order, as precise as stored."""
        if not found:
            return {}
        stored = self.weights.stored
        paths = [path for path, _ in visit.block.named_parameters()]
        names = {path: stored.get(f"{block.name}.{path}", "") for path in paths}
        copies = {path: others[name].clone() for path, name in names.items() if name in others}
        return {names[path]: copies[path] for path in rearrange(visit, found, copies)}

    def _write_adapters(self, block: Block, outcomes: list[Outcome]) -> None:
        if self.plan.recipe.recover == "lowrank":
            found = {each.linear.name: each.adapter for each in outcomes if each.adapter}
            lowrank.write_part(self.output.folder, block.name, found)

    def _entry(self, outcome: Outcome, number: int) -> dict[str, Any]:
        tensor = self.weights.stored[f"{outcome.linear.name}.weight"]
        transposed = orientation(self.plan.model.get_submodule(outcome.linear.name))[2]
        return {**outcome.entry, "block": number, "tensor": tensor, "transposed": transposed}

    def _restore_block(
        self, visit: LoadedBlock, block: Block, number: int, layers: list[dict[str, Any]]
    ) -> None:
        """Give a visited block the weights that an earlier run pruned."""
        visit.fork_dense()
        written = load_file(self.output.shard(number + 2))
        entries = {layer["name"]: layer for layer in layers}
        for linear in block.pruned:
            entry = entries[linear.name]
            stored = Stored(*entry["stored"]) if "stored" in entry else None
            weight = unpack(self.format, entry["tensor"], written, stored)
            self.weights.assign(visit.block.get_submodule(linear.path), "weight", weight)
        if self.plan.recipe.recover == "lowrank":
            for name, adapter in lowrank.read_part(self.output.folder, block.name).items():
                adapter.add_to(self.plan.model.get_submodule(name))

    def _report(
        self, tokens: Tokens | None, counted: dict[str, Any], proof: dict[str, Any]
    ) -> dict[str, Any]:
        from prunekit._version import __version__

        plan, done = self.plan, self.output.done
        judged = [values for (kind, _), values in done.items() if kind == "evaluation"]
        peaks, needs = environment.peak_memory(plan.device), plan.memory
        compressed, read = self._compressed(), result_facts.calibration_facts(plan, tokens)
        return {
            "prunekit": __version__,
            "config": plan.config.dump(),
            "config_text": plan.config.text,
            "model": result.model_facts(plan),
            "calibration": read
            and read
            | {"hidden": needs.where, "gathers": [kind.name for kind in plan.recipe.needs]},
            "sparsity": result.sparsity_facts(plan, counted),
            "storage": result.storage_facts(
                plan, self.output.folder, compressed, len(self.layers) - len(compressed)
            ),
            "layers": self.layers,
            "evaluation": result_facts.paired(judged),
            "seconds": {**self.seconds, "total": self.elapsed},
            "memory": {
                **peaks,
                "block_bytes": needs.block,
                "statistics_bytes": needs.statistics,
                "hidden_bytes": needs.hidden,
            },
            "seed": plan.config.calibration.seed if plan.config.calibration else None,
            "environment": environment.environment(plan.device),
            "notes": list(plan.notes),
            "files": {
                values["file"]: values["sha256"] for values in done.values() if "sha256" in values
            },
            "proof": proof,
        }
