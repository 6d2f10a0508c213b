"""Structured run: rank units, gate them, refit, remove, train, write and verify.

The whole model is in memory, since units of all layers are compared. The checkpoint is written as
one shard: a run that was stopped before starts again, except for its evaluations.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel
from typing_extensions import override

from prunekit.checkpoint.atomic import file_sha256
from prunekit.checkpoint.reader import Checkpoint, open_checkpoint
from prunekit.data.tokens import Tokens
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.evaluation.verify import make_proof
from prunekit.models.load import load
from prunekit.models.sequential.pipeline import BATCH_TOKENS
from prunekit.models.units.removal import count_parameters, described_model
from prunekit.models.weight_names import stored_names
from prunekit.reports import report as reports
from prunekit.runs.base import RunBase
from prunekit.runs.distillation import teacher_of
from prunekit.runs.record import Record
from prunekit.runs.structured import result
from prunekit.runs.structured.apt import train_adapters
from prunekit.runs.structured.gradual import prune_while_training
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.structured.ranking import CalibrationBatches, UnitRanking
from prunekit.runs.structured.written import (
    config_changes,
    remember_stored,
    restore_stored,
    written_tensors,
)
from prunekit.runs.texts import Data, own_batches
from prunekit.runs.training import (
    Texts,
    adapted,
    train_model,
    training_facts,
    training_texts,
)
from prunekit.structured.batches import Batch, mean_loss
from prunekit.structured.blockwise_refit import compensate
from prunekit.structured.finalize import Finalized
from prunekit.structured.unit_gates import Gates
from prunekit.training.teachers import Teacher


def run(
    plan: StructuredPlan,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """Carry out a plan and yield its records as they are measured.

    Args:
        plan: From :func:`prunekit.runs.structured.planner.plan`.
        resume: Continue in an output folder that a stopped run left.
        overwrite: Replace an output folder.
        stop: See :meth:`RunBase.stoppable_records`.

    Raises:
        PrunekitError: The run failed; the output folder can be resumed.
    """
    work = StructuredRun(plan)
    yield from work.stoppable_records(resume=resume, overwrite=overwrite, stop=stop)


class StructuredRun(RunBase[StructuredPlan]):
    """A run that removes units from one model."""

    def __init__(self, plan: StructuredPlan) -> None:
        super().__init__(plan, 1, plan.ranks)

    @override
    def records(self, *, resume: bool, overwrite: bool) -> Iterator[Record]:
        """Yield the records of the whole run."""
        plan = self.plan
        tokens, evaluated = self._begin(resume=resume, overwrite=overwrite)
        groups = sum(map(len, plan.groups.values()))
        count = tokens.tokens if tokens else 0
        facts = {"blocks": plan.block_count, "linears": groups, "tokens": count}
        yield Record("start", "", facts)
        yield from self._evaluate("before", evaluated)
        if ("shrunk", "") not in self.output.journal:
            yield from self._remove_units(tokens)
        removal = self.output.journal["shrunk", ""]
        for entry in removal["layers"]:
            yield Record("layer", entry["name"], entry)
        with self._timed("write"):
            config = plan.checkpoint.config | removal["config"]
            config = {key: value for key, value in config.items() if key not in removal["dropped"]}
            smaller = replace(plan.checkpoint, config=config)
            self.ranks.run_on_main(
                lambda: self.output.finish(smaller, self.dtype, check=self._check_complete)
            )
        yield from self._evaluate("after", evaluated)
        yield Record("phase", "verify", {"steps": 1})
        report = self.ranks.run_on_main(lambda: self._verify(tokens, removal))
        yield Record("finish", str(self.output.folder), report)

    def _check_complete(self, written: Checkpoint) -> None:
        """Refuse a checkpoint that lacks tensors of the model it describes."""
        stored_names(described_model(self.plan.model, written.config), written)

    def _verify(self, tokens: Data | None, removal: dict[str, Any]) -> dict[str, Any]:
        """Verify the written checkpoint; write and return the report."""
        with self._timed("verify"):
            proof = make_proof(open_checkpoint(self.output.folder), self.plan.device)
        report = result.report(self.plan, self._report_frame(tokens, proof), removal)
        reports.write(report, self.output.folder)
        self.output.append_journal("finish", "", {"seconds": report["seconds"]["total"]})
        return report

    def _remove_units(self, tokens: Data | None) -> Iterator[Record]:
        """Rank and remove units, refit, train and write the weights."""
        plan = self.plan
        with self._timed("calibrate"):
            model = load(plan.checkpoint, plan.dtype)
            self.weights_read.require_same(self.ranks)
            model.to(plan.device)  # pyright: ignore
            remember_stored(plan, model)
            before = model.config.to_dict()
            data = CalibrationBatches(_batches(tokens, model, self.ranks), _batches(tokens, model))
            texts = training_texts(plan, tokens)
            base = mean_loss(model, texts[1]) if texts else 0.0
        trains_after = texts is not None and not (plan.config.apt or plan.config.prune.gradual)
        teacher = teacher_of(plan, model) if trains_after else None
        training = None
        with ExitStack() as stack:
            ranking = UnitRanking(plan, model, stack, data, self._timed)
            if texts and plan.config.apt:
                done, training = yield from self._train_adapters(ranking, texts, base)
            elif texts and plan.config.prune.gradual:
                done, training = yield from self._prune_while_training(ranking, texts, base)
            else:
                done = yield from self._prune_once(ranking, tokens)
        if texts and training is None:
            training = yield from self._train(ranking, texts, base, teacher)
        with self._timed("write"):
            kept = {
                name: entry["kept"]
                for name, entry in ranking.entries.items()
                if entry["kind"] == "blocks"
            }
            changed, dropped = config_changes(plan, before, model.config.to_dict(), kept)
            facts = {
                "layers": [ranking.entries[name] for name in _run_order(model, ranking.entries)],
                "parameters": [plan.parameters, count_parameters(model)],
                "stock": all(each.stock for each in done),
                "note": _note(done),
                "views": ranking.views,
                "training": training,
                "agreement": ranking.agreement,
                "config": changed,
                "dropped": dropped,
            }
            if self.ranks.is_main:
                shard = self.output.write_shard(1, written_tensors(plan, model, kept))
                facts["files"] = {shard.name: file_sha256(shard)}
            self.output.append_journal("shrunk", "", facts)

    def _prune_once(
        self, ranking: UnitRanking, tokens: Data | None
    ) -> Generator[Record, None, list[Finalized]]:
        """Rank and remove units, and compensate for them."""
        gates, done = yield from ranking.rank()
        if self.plan.config.prune.compensate != "none" and tokens and gates:
            yield from self._refit(ranking.model, gates, tokens)
        with self._timed("prune"):
            return [*done, *map(ranking.finalize, gates)]

    def _prune_while_training(
        self, ranking: UnitRanking, texts: Texts, base: float
    ) -> Generator[Record, None, tuple[list[Finalized], dict[str, Any]]]:
        """Close gates while the model is trained, then remove their units."""
        self._widen(ranking.model)
        every = ranking.gate_all()
        dense = ranking.measure(every)
        training = prune_while_training(ranking, every, texts)
        rows = yield from self._timed_records("train", training)
        gates, done = ranking.settle(every, dense)
        with self._timed("prune"):
            done += map(ranking.finalize, gates)
        return done, training_facts(base, rows, gradual=True)

    def _train_adapters(
        self, ranking: UnitRanking, texts: Texts, base: float
    ) -> Generator[Record, None, tuple[list[Finalized], dict[str, Any]]]:
        """Train adapters that prune the model and grow, and merge them."""
        self._widen(ranking.model)
        every = ranking.gate_all()
        training = train_adapters(ranking, every, ranking.measure(every), texts)
        done, rows = yield from self._timed_records("train", training)
        return done, training_facts(base, rows, gradual=True)

    def _train(
        self, ranking: UnitRanking, texts: Texts, base: float, teacher: Teacher | None
    ) -> Generator[Record, None, dict[str, Any]]:
        """Train the smaller model; return the facts of it."""
        self._widen(ranking.model)
        kept = {name: entry["kept"] for name, entry in ranking.entries.items()}
        with adapted(self.plan, ranking.model) as trained:
            training = train_model(self.plan, trained, texts, teacher=teacher, kept=kept)
            rows = yield from self._timed_records("train", training)
        return training_facts(base, rows, gradual=False)

    def _refit(self, model: PreTrainedModel, gates: list[Gates], tokens: Data) -> Iterator[Record]:
        """Refit, block by block, the linears that read removed units."""
        kept, sites = {}, []
        for each in gates:
            kept |= each.kept
            sites += each.linear_groups
            each.detach()
        how = self.plan.config.prune.compensate
        yield Record("phase", how, {"steps": self.plan.block_count})
        own = own_batches(tokens, self.plan.device, self.ranks)
        blocks = compensate(model, sites, kept, own, how, self.ranks)
        while True:
            with self._timed("prune"):
                name = next(blocks, None)
            if name is None:
                break
            yield Record("step", name)

    def _widen(self, model: PreTrainedModel) -> None:
        """Convert a model to float32, in which it is trained."""
        model.float()
        restore_stored(model, self.plan.dtype)


def _batches(tokens: Data | None, model: PreTrainedModel, ranks: Ranks = SINGLE) -> list[Batch]:
    """Return the calibration batches of one rank; ``SINGLE`` has all."""
    if tokens is None:
        return []
    batches = tokens.batches(BATCH_TOKENS["cpu"], ranks.shard(len(tokens)))
    if model.config.is_encoder_decoder and isinstance(tokens, Tokens):
        return [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches]
    return batches


def _run_order(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return sorted(names, key=lambda name: order[name])


def _note(done: list[Finalized]) -> str:
    return next((each.note for each in done if not each.stock), done[0].note)
