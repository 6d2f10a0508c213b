"""A run that takes units out: rank, gate, make up for what goes, remove, train, write, prove.

The whole model is in memory, since what is compared are units of all layers. The checkpoint is
written in one piece: a run that was stopped before that begins again, but for what it measured.
"""

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.allocations.schedules import SCHEDULES, Schedule
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.data.tokens import Tokens
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import ConfigError
from prunekit.evaluation.verify import prove
from prunekit.formatting import percent
from prunekit.models.load import load
from prunekit.models.sequential.pipeline import BATCH_TOKENS
from prunekit.models.units.blocks import depths
from prunekit.models.units.kinds import WHOLE, Kind
from prunekit.reports import environment
from prunekit.reports import report as reports
from prunekit.runs import facts as result_facts
from prunekit.runs.base import RunBase
from prunekit.runs.record import Record, stoppable
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.structured.planner import check_some_go, terms
from prunekit.runs.structured.ranking import TRUTH_TOKENS, _shared
from prunekit.runs.structured.result import VIEWED_HEADS, VIEWED_TOKENS, _described, _rounded
from prunekit.structured.agreement import spearman
from prunekit.structured.batches import Batch, mean_loss, still
from prunekit.structured.blockwise_refit import compensate
from prunekit.structured.parameter_budget import choose_within
from prunekit.structured.probes.attention_entropy import measure
from prunekit.structured.probes.attention_maps import activity, attention_maps
from prunekit.structured.rankers import Scores
from prunekit.structured.unit_gates import Finalized, Gates
from prunekit.training.recover import TRACKED, TrainingStep, recover, summary


def run(
    plan: StructuredPlan,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """Carry out a plan and yield what was measured; ``stop`` is asked after each record.

    Where one rank says yes, all stop.

    Raises:
        StoppedError: So it was asked.
        PrunekitError: See each kind; the folder then stays resumable.
    """
    work = StructuredRun(plan)
    try:
        records = work.records(resume=resume, overwrite=overwrite)
        yield from stoppable(records, lambda: any(plan.ranks.all_gather_object(stop())))
    finally:
        work.output.close()


class StructuredRun(RunBase[StructuredPlan]):
    """One run and what it has measured so far."""

    def __init__(self, plan: StructuredPlan) -> None:
        super().__init__(plan, 1, plan.ranks)
        self.whole: list[Batch] = []  # what all ranks read, of which each has its part
        self.views: dict[str, Any] | None = None
        self.truths: dict[Kind, Scores] = {}
        self.agreement: dict[Kind, float] = {}
        if plan.config.train:
            self.seconds["train"] = 0.0

    def records(self, *, resume: bool, overwrite: bool) -> Iterator[Record]:
        """Yield the records of the whole run."""
        plan = self.plan
        tokens, judged = self._begin(resume=resume, overwrite=overwrite)
        blocks = sum(len(runner.blocks) for runner in plan.stacks)
        sites = sum(map(len, plan.places.values()))
        count = tokens.ids.numel() if tokens else 0
        yield Record("start", "", {"blocks": blocks, "linears": sites, "tokens": count})
        yield from self._evaluate("before", judged)
        if ("shrunk", "") not in self.output.done:
            yield from self._shrink(tokens)
        shrunk = self.output.done["shrunk", ""]
        for entry in shrunk["layers"]:
            yield Record("layer", entry["name"], entry)
        with self._timed("write"):
            config = plan.checkpoint.config | shrunk["config"]
            config = {key: value for key, value in config.items() if key not in shrunk["dropped"]}
            made = replace(plan.checkpoint, config=config)
            self.ranks.run_on_main(lambda: self.output.finish(made, self.dtype))
        yield from self._evaluate("after", judged)
        yield Record("phase", "verify", {"steps": 1})
        report = self.ranks.run_on_main(lambda: self._prove(tokens, shrunk))
        yield Record("finish", str(self.output.folder), report)

    def _prove(self, tokens: Tokens | None, shrunk: dict[str, Any]) -> dict[str, Any]:
        """Look at what was written, and write and return the report."""
        with self._timed("verify"):
            proof = prove(open_checkpoint(self.output.folder), self.plan.device)
        report = self._report(tokens, shrunk, proof)
        reports.write(report, self.output.folder)
        self.output.note("finish", "", {"seconds": report["seconds"]["total"]})
        return report

    def _shrink(self, tokens: Tokens | None) -> Iterator[Record]:
        """Take the units out and write what is left."""
        plan, prune = self.plan, self.plan.config.prune
        with self._timed("calibrate"):
            model = load(plan.checkpoint.folder, plan.dtype)
            model.to(plan.device)  # pyright: ignore
            before = model.config.to_dict()
            self.whole = _batches(tokens, model)
            read = _batches(tokens, model, self.ranks)
            texts = self._training_texts(tokens)
            base = mean_loss(model, texts[1]) if texts else 0.0
        entries: dict[str, dict[str, Any]] = {}
        with ExitStack() as stack:
            if prune.parameters is None:
                made = self._rank_in_turn(model, stack, read, entries)
            else:
                made = self._rank_together(model, stack, read, entries)
            gates, done = yield from made
            if prune.compensate != "none" and tokens and gates:
                yield from self._refit(model, gates, tokens)
            with self._timed("prune"):
                done += [each.finalize(stock=prune.uniform) for each in gates]
        training = None
        if texts:
            training = summary(base, (yield from self._train(model, *texts)))
        with self._timed("write"):
            if self.ranks.is_main:
                self.output.write(1, self._tensors(model))
            after = model.config.to_dict()
            facts = {
                "layers": [entries[name] for name in _in_run_order(model, entries)],
                "parameters": [plan.parameters, done[-1].parameters[1]],
                "stock": all(each.stock for each in done),
                "note": _note(done),
                "views": self.views,
                "training": training,
                "agreement": self.agreement,
                "config": {
                    key: value
                    for key, value in after.items()
                    if key != "quantization_config" and before.get(key) != value
                },
                "dropped": sorted(before.keys() - after.keys()),
            }
            self.output.note("shrunk", "", facts)

    def _rank_in_turn(
        self,
        model: PreTrainedModel,
        stack: ExitStack,
        read: list[Batch],
        entries: dict[str, dict[str, Any]],
    ) -> Generator[Record, None, tuple[list[Gates], list[Finalized]]]:
        """Close the gates of a part of each kind, ranked in what the kinds before it left.

        Blocks and coordinates are taken out; the gates of heads and neurons are returned.
        """
        prune = self.plan.config.prune
        gates: list[Gates] = []
        done: list[Finalized] = []
        for kind in prune.pattern:
            each = stack.enter_context(Gates(model, kind))
            steps, schedule = self._steps(each)
            yield Record("phase", f"rank {kind}", {"steps": steps})
            entropies, scores = self._entropies(kind, each, read), {}
            for step in range(1, steps + 1):
                with self._timed("prune"):
                    found = self._score(each, read)
                    if not scores:
                        self._view(each, found, read)
                        self._compare_with_leave_one_out(each, found)
                    scores = scores or found
                    part = schedule(step, steps, prune.sparsity or 0.0, 0.0)
                    each.prune(
                        found, part, scope=prune.scope, least=prune.least, round_to=prune.round_to
                    )
                yield Record("step", f"{percent(part)} of {kind}")
            self._mark_kept_heads(each)
            units = sum(place.units for place in each.places)
            check_some_go(prune, kind, units, units - sum(map(len, each.kept.values())))
            entries |= _described(each, scores, entropies, self.truths.get(kind, {}))
            if kind in WHOLE:
                done.append(self._take_out(each))
            else:
                gates.append(each)
        return gates, done

    def _rank_together(
        self,
        model: PreTrainedModel,
        stack: ExitStack,
        read: list[Batch],
        entries: dict[str, dict[str, Any]],
    ) -> Generator[Record, None, tuple[list[Gates], list[Finalized]]]:
        """Close gates of all kinds until so many parameters are left; as above."""
        plan, prune = self.plan, self.plan.config.prune
        every = [stack.enter_context(Gates(model, kind)) for kind in prune.pattern]
        found = [place for each in every for place in each.places]
        steps, schedule = prune.steps if prune.steps != "each" else 1, SCHEDULES[prune.schedule]
        yield Record("phase", f"rank {' and '.join(prune.pattern)}", {"steps": steps})
        entropies = {each.kind: self._entropies(each.kind, each, read) for each in every}
        first: dict[Kind, Scores] = {}
        for step in range(1, steps + 1):
            with self._timed("prune"):
                ranked: dict[Kind, Scores] = {each.kind: self._score(each, read) for each in every}
                if not first:
                    for each in every:
                        self._view(each, ranked[each.kind], read)
                        self._compare_with_leave_one_out(each, ranked[each.kind])
                first = first or ranked
                part = 1 - schedule(step, steps, 1 - (prune.parameters or 0.0), 0.0)
                scores = {name: score for each in ranked.values() for name, score in each.items()}
                keep = {name: units for each in every for name, units in each.keep.items()}
                asked = terms(plan, model, part)
                stays = choose_within(found, scores, keep, plan.parameters, asked)
                for each in every:
                    each.close(stays)
            yield Record("step", f"{percent(part)} of the parameters")
        gates: list[Gates] = []
        done: list[Finalized] = []
        for each in every:
            self._mark_kept_heads(each)
            names = each.follow()
            entries |= _described(
                each,
                {name: first[each.kind][old] for name, old in names.items()},
                {name: entropies[each.kind].get(old) for name, old in names.items()},
                {
                    name: truth[old]
                    for truth in [self.truths.get(each.kind)]
                    for name, old in names.items()
                    if truth
                },
            )
            if each.kind in WHOLE:
                done.append(self._take_out(each))
            else:
                gates.append(each)
        return gates, done

    def _take_out(self, gates: Gates) -> Finalized:
        with self._timed("prune"):
            done = gates.finalize(stock=self.plan.config.prune.uniform)
        gates.detach()
        return done

    def _score(self, gates: Gates, read: list[Batch]) -> Scores:
        prune = self.plan.config.prune
        found = gates.score(prune.method, read or None, ranks=self.ranks)
        return _shared(gates.sites, found) if prune.uniform else found

    def _steps(self, gates: Gates) -> tuple[int, Schedule]:
        """Return in how many steps units go, and the schedule of their sparsity."""
        prune = self.plan.config.prune
        if prune.steps != "each":
            return prune.steps, SCHEDULES[prune.schedule]
        units = [place.units for place in gates.places]
        most = max(units) if prune.scope == "layer" else sum(units)
        return max(1, int((prune.sparsity or 0.0) * most + 0.5)), SCHEDULES["linear"]

    def _view(self, gates: Gates, scores: Scores, read: list[Batch]) -> None:
        """Look at a few heads on a few tokens, and at how alike the heads of a layer are."""
        if gates.kind != "heads" or not read or not self.ranks.is_main:
            return
        few = {name: part[:1, :VIEWED_TOKENS] for name, part in read[0].items()}
        ranked = sorted(
            (float(score), site, unit)
            for site in range(len(gates.sites))
            for unit, score in enumerate(scores[gates.sites[site].name])
        )
        ends = [*ranked[:VIEWED_HEADS], *ranked[VIEWED_HEADS:][-VIEWED_HEADS:]]
        chosen = [
            (gates.sites[site], unit * gates.sites[site].reader.index.shape[1])
            for _, site, unit in ends
        ]
        with still(gates.model):
            maps = attention_maps(gates.model, chosen, few)
            norms = activity(gates.model, chosen, few)
        alike = gates.redundancy(read[:1])
        self.views = {
            "tokens": [self.plan.tokenizer.decode([word]) for word in few["input_ids"][0].tolist()],
            "heads": [
                {
                    "layer": site.name,
                    "head": head,
                    "unit": unit,
                    "score": score,
                    "attention": _rounded(seen),
                    "activity": _rounded(norm),
                }
                for (site, head), (score, _, unit), seen, norm in zip(
                    chosen, ends, maps, norms, strict=True
                )
            ],
            "redundancy": {name: _rounded(value) for name, value in alike.items()},
        }

    def _compare_with_leave_one_out(self, gates: Gates, scores: Scores) -> None:
        """Hold the ranker against the truth, if asked for: what the loss is without each unit."""
        if not self.plan.config.prune.truth:
            return
        samples = max(1, TRUTH_TOKENS // self.whole[0]["input_ids"].shape[1])
        few, left = [], samples
        for batch in self.whole:
            if left > 0:
                few.append({name: part[:left] for name, part in batch.items()})
                left -= len(batch["input_ids"])
        truth = gates.score("leave-one-out", few)
        self.truths[gates.kind] = truth
        self.agreement[gates.kind] = spearman(scores, truth)

    def _mark_kept_heads(self, gates: Gates) -> None:
        """Say of the heads that are shown whether they stay."""
        if gates.kind == "heads" and self.views:
            for head in self.views["heads"]:
                head["kept"] = bool(gates.keep[head["layer"]][head["unit"]])

    def _entropies(self, kind: Kind, gates: Gates, read: list[Batch]) -> dict[str, list[float]]:
        """Return the normalised attention entropy of each head, for the report."""
        if kind != "heads" or not read:
            return {}
        with self._timed("calibrate"):
            found = measure(gates.model, gates.sites, read, self.ranks)
        return {
            name: (sums.entropy / sums.log_keys.clamp_min(1e-12)).tolist()
            for name, sums in found.items()
        }

    def _refit(
        self, model: PreTrainedModel, gates: list[Gates], tokens: Tokens
    ) -> Iterator[Record]:
        kept, found = {}, []
        for each in gates:
            kept |= each.kept
            found += each.sites
            each.detach()
        how = self.plan.config.prune.compensate
        yield Record("phase", how, {"steps": sum(len(s.blocks) for s in self.plan.stacks)})
        own = tokens.ids[self.ranks.shard(len(tokens.ids))]
        blocks = compensate(model, found, kept, own, how, self.ranks)
        while True:
            with self._timed("prune"):
                name = next(blocks, None)
            if name is None:
                break
            yield Record("step", name)

    def _training_texts(self, tokens: Tokens | None) -> tuple[list[Batch], list[Batch]] | None:
        """Return what is trained on and what is held out, if a training is asked for."""
        train = self.plan.config.train
        if train is None or tokens is None:
            return None
        if len(tokens.ids) <= train.held_out:
            raise ConfigError(
                f"calibration.data: there is text for {len(tokens.ids)} samples, of which "
                f"train.held_out = {train.held_out} leave none to train on."
            )
        ids = tokens.ids.to(self.plan.device)
        parts = ids[: -train.held_out], ids[-train.held_out :]
        trained, held = ([{"input_ids": each} for each in p.split(train.batch)] for p in parts)
        return trained, held

    def _train(
        self, model: PreTrainedModel, trained: list[Batch], held_out: list[Batch]
    ) -> Generator[Record, None, list[TrainingStep]]:
        train = self.plan.config.train
        assert train is not None
        yield Record("phase", "train", {"steps": train.steps // TRACKED})
        moments = []
        model.float()
        steps = recover(model, trained, held_out, train)
        while True:
            with self._timed("train"):
                moment = next(steps, None)
            if moment is None:
                break
            moments.append(moment)
            if moment.step and moment.step % TRACKED == 0:
                yield Record("step", f"{moment.step} steps")
        model.to(self.plan.dtype)  # pyright: ignore
        return moments

    def _tensors(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return what the checkpoint holds, by the names that it has there."""
        checkpoint, config = self.plan.checkpoint, self.plan.config
        asked = None if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
        values, stored = model.state_dict(), self.plan.stored
        rest = checkpoint.entries.keys() - set(stored.values())
        found = checkpoint.read(name for name in rest if not _of_no_block(model, name))
        found |= {stored[name]: values[name] for name in stored if name in values}
        return {
            name: _stored(value, asked or checkpoint.entries[name].dtype)
            for name, value in found.items()
        }

    def _report(
        self, tokens: Tokens | None, shrunk: dict[str, Any], proof: dict[str, Any]
    ) -> dict[str, Any]:
        from prunekit._version import __version__

        plan, layers = self.plan, shrunk["layers"]
        judged = [values for (kind, _), values in self.output.done.items() if kind == "evaluation"]
        gone = {
            kind: [
                sum(layer["units"] - len(layer["kept"]) for layer in found),
                sum(layer["units"] for layer in found),
            ]
            for kind in plan.config.prune.pattern
            for found in [[layer for layer in layers if layer["kind"] == kind]]
        }
        before, after = shrunk["parameters"]
        return {
            "prunekit": __version__,
            "kind": reports.UNITS,
            "config": plan.config.dump(),
            "config_text": plan.config.text,
            "model": {
                "path": plan.config.model.path,
                "architecture": type(plan.model).__name__,
                "model_type": plan.model.config.model_type,
                "parameters": before,
                "prunable_parameters": plan.prunable,
                "blocks": sum(len(runner.blocks) for runner in plan.stacks),
                "compute_dtype": str(plan.dtype).removeprefix("torch."),
            },
            "calibration": result_facts.calibration_facts(plan, tokens),
            "sparsity": {
                "target": plan.config.prune.sparsity,
                "budget": plan.config.prune.parameters,
                "achieved": sum(part for part, _ in gone.values())
                / sum(whole for _, whole in gone.values()),
                "pattern": " and ".join(plan.config.prune.pattern),
                "removed": gone,
                "parameters": [before, after],
                "whole_model": 1 - after / before,
            },
            "layers": layers,
            "stock": shrunk["stock"],
            "views": shrunk["views"],
            "training": shrunk["training"],
            "agreement": shrunk["agreement"],
            "evaluation": result_facts.paired(judged),
            "seconds": {**self.seconds, "total": self.elapsed},
            "memory": {
                **environment.peak_memory(plan.device),
                **{f"{name}_bytes": value for name, value in plan.memory.items()},
            },
            "seed": plan.config.calibration.seed if plan.config.calibration else None,
            "environment": environment.environment(plan.device),
            "notes": [*plan.notes, shrunk["note"]],
            "proof": proof,
        }


def _batches(tokens: Tokens | None, model: PreTrainedModel, ranks: Ranks = SINGLE) -> list[Batch]:
    """Return what a rank reads of the calibration text."""
    if tokens is None:
        return []
    own = tokens.ids[ranks.shard(len(tokens.ids))]
    size = max(1, BATCH_TOKENS["cpu"] // tokens.ids.shape[1])
    reads = (
        ("input_ids", "decoder_input_ids") if model.config.is_encoder_decoder else ("input_ids",)
    )
    return [dict.fromkeys(reads, part) for part in own.split(size)]


def _in_run_order(model: PreTrainedModel, names: dict[str, Any]) -> list[str]:
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return sorted(names, key=lambda name: order[name])


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.detach().cpu()
    return value.to(dtype).contiguous() if value.is_floating_point() else value.contiguous()


def _of_no_block(model: PreTrainedModel, name: str) -> bool:
    """Say whether a tensor that no module reads, as GPT-2's masks, is of a block that went.

    Blocks are numbered anew, so that it is the names of the last ones that are left over.
    """
    for place in depths(model):
        found = re.search(rf"(?:^|\.){re.escape(place.stack.blocks)}\.(\d+)\.", name)
        if found and int(found[1]) >= place.units:
            return True
    return False


def _note(done: list[Finalized]) -> str:
    return next((each.note for each in done if not each.stock), done[0].note)
