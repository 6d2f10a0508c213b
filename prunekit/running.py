"""The main job as a stream of records: calibrate, judge, prune block by block, prove, report.

Nothing is printed here: progress bar, journal and report are readers of the same records.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from prunekit import lowrank, result
from prunekit import report as reports
from prunekit.checkpoint import open_checkpoint
from prunekit.data import Tokens
from prunekit.errors import StoppedError
from prunekit.formats import Stored, format_named
from prunekit.framing import Framed, Record
from prunekit.layout import Block, orientation
from prunekit.loading import Weights
from prunekit.permutation import orders, rearrange
from prunekit.planning import Plan
from prunekit.pruning import BlockPruner, Outcome, survey
from prunekit.storage import layer_of, pack, unpack
from prunekit.verify import prove, recount
from prunekit.walk import Visit, batches, walk


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
    yield from Run(plan, stop).records(resume=resume, overwrite=overwrite)


class Run(Framed[Plan]):
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
            self.ranks.lead(self._finish)
        yield from self._evaluate("after", judged)
        yield Record("phase", "verify", {"steps": 1})
        peaks = self.ranks.exchange(result.peak_memory(plan.device))
        sent = self.ranks.exchange(dict(self.ranks.traffic))
        report = self.ranks.lead(lambda: self._prove(tokens, peaks, sent))
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
        if self.ranks.several:
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
                known = self.ranks.lead(lambda: found)
            self.output.note("allocation", allocation.name, known)
        return known

    def _visits(
        self, tokens: Tokens | None, *, beside: bool = False
    ) -> Iterator[tuple[Visit, Block]]:
        """Visit every block with this rank's tokens, or with one token where none is needed."""
        plan = self.plan
        ids = torch.zeros(1, 1, dtype=torch.int64)
        if tokens:
            ids = tokens.ids[self.ranks.part(len(tokens.ids))]
        parts = batches(ids, plan.device)
        visits = walk(plan.model, plan.stacks, self.weights, parts, self.ranks, beside=beside)
        return zip(visits, plan.blocks, strict=True)

    def _prune(self, tokens: Tokens | None, sparsities: Mapping[str, float]) -> Iterator[Record]:
        plan = self.plan
        yield Record("phase", "prune", {"steps": len(plan.blocks)})
        with self._timed("write"):
            self._write_rest()
        at_once = all(self.ranks.exchange(plan.at_once))
        pruner = BlockPruner(plan.recipe, sparsities, plan.stored, at_once)
        began = time.perf_counter()
        visits = self._visits(tokens, beside=plan.recipe.beside)
        for number, (visit, block) in enumerate(visits):
            # Nobody reads what the last block of the last stack gives.
            visit.onward = bool(plan.recipe.needs) and number + 1 < len(plan.blocks)
            known = self.output.done.get(("block", block.name))
            if known is None:
                found, outcomes = orders(visit, block, plan.recipe), []
                moved = rearrange(visit, found)
                for outcome in pruner.prune(visit, block):
                    outcomes.append(outcome)
                    yield Record("layer", outcome.linear.name, self._entry(outcome, number))
                seconds = time.perf_counter() - began
                known = self._write_block(number, visit, block, outcomes, moved)
                known |= {"seconds": seconds, "orders": found}
                self.output.note("block", block.name, known)
            else:
                rearrange(visit, known["orders"])
                self._take_over(visit, block, number, known["layers"])
                for entry in known["layers"]:
                    yield Record("layer", entry["name"], entry)
            self.layers += known["layers"]
            self.seconds["prune"] += known["seconds"]
            facts = {"index": number, "seconds": known["seconds"], "file": known["file"]}
            yield Record("block", block.name, facts)
            if any(self.ranks.exchange(self.stop())):
                raise StoppedError(f"Stopped as asked, after {block.name}.")
            began = time.perf_counter()

    def _write_rest(self) -> None:
        """Write the first shard: what lies outside the blocks, as it is."""
        if ("rest", "") in self.output.done or not self.ranks.first:
            return
        inside = {name for block in self.plan.blocks for name in self._names(block)}
        names = [name for name in self.plan.checkpoint.entries if name not in inside]
        self.output.write(1, self._stored(names))
        self.output.note("rest", "", {})

    def _names(self, block: Block) -> list[str]:
        """Return the names that a block's tensors have in the checkpoint."""
        prefix = f"{block.name}."
        return [stored for name, stored in self.weights.stored.items() if name.startswith(prefix)]

    def _stored(self, names: list[str]) -> dict[str, Tensor]:
        tensors = self.plan.checkpoint.read(names)
        if self.plan.config.model.dtype == "auto":
            return tensors
        dtype = getattr(torch, self.plan.config.model.dtype)
        return {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }

    def _write_block(
        self, number: int, visit: Visit, block: Block, outcomes: list[Outcome], moved: list[str]
    ) -> dict[str, Any]:
        """Write a block's shard; parameters that ``moved`` are written as they lie now."""
        with self._timed("write"):
            layers, packed = [self._entry(outcome, number) for outcome in outcomes], {}
            for layer, outcome in zip(layers, outcomes, strict=True):
                name, transposed = layer["tensor"], layer["transposed"]
                tensors, stored = pack(self.format, name, outcome.weight, transposed=transposed)
                packed |= tensors
                if stored:
                    layer["stored"] = stored.dump()
            # The others go on; should it not get written, they hear of it where they wait next.
            if self.ranks.first:
                self._write_adapters(block, outcomes)
                pruned = {layer["tensor"] for layer in layers}
                others = self._stored([name for name in self._names(block) if name not in pruned])
                for path in moved:
                    name = self.weights.stored[f"{block.name}.{path}"]
                    if name in others:
                        parameter = visit.block.get_parameter(path)
                        others[name] = parameter.to(others[name].dtype, copy=True).cpu()
                self.output.write(number + 2, others | packed)
        return {"file": self.output.shard(number + 2).name, "layers": layers}

    def _write_adapters(self, block: Block, outcomes: list[Outcome]) -> None:
        if self.plan.recipe.recover == "lowrank":
            found = {each.linear.name: each.adapter for each in outcomes if each.adapter}
            lowrank.write_part(self.output.folder, block.name, found)

    def _entry(self, outcome: Outcome, number: int) -> dict[str, Any]:
        tensor = self.weights.stored[f"{outcome.linear.name}.weight"]
        transposed = orientation(self.plan.model.get_submodule(outcome.linear.name))[2]
        return {**outcome.entry, "block": number, "tensor": tensor, "transposed": transposed}

    def _take_over(
        self, visit: Visit, block: Block, number: int, layers: list[dict[str, Any]]
    ) -> None:
        """Give a visited block the weights that an earlier run pruned."""
        visit.part()
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
        from prunekit import __version__

        plan, done = self.plan, self.output.done
        judged = [values for (kind, _), values in done.items() if kind == "evaluation"]
        peaks, needs = result.peak_memory(plan.device), plan.memory
        compressed = self._compressed()
        return {
            "prunekit": __version__,
            "config": plan.config.dump(),
            "config_text": plan.config.text,
            "model": result.model_facts(plan),
            "calibration": result.calibration_facts(plan, tokens),
            "sparsity": result.sparsity_facts(plan, counted),
            "storage": result.storage_facts(
                plan, self.output.folder, compressed, len(self.layers) - len(compressed)
            ),
            "layers": self.layers,
            "evaluation": result.paired(judged),
            "seconds": {**self.seconds, "total": self.elapsed},
            "memory": {
                **peaks,
                "block_bytes": needs.block,
                "statistics_bytes": needs.statistics,
                "hidden_bytes": needs.hidden,
            },
            "seed": plan.config.calibration.seed if plan.config.calibration else None,
            "environment": result.environment(plan.device),
            "notes": list(plan.notes),
            "proof": proof,
        }
