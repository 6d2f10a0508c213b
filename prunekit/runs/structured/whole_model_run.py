"""Structured run with the whole model in memory, which it trains.

The checkpoint is written as one shard: a run that was stopped before starts again, except for its
evaluations, and for its training, which continues from the last saved state.
"""

from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel
from typing_extensions import override

from prunekit.checkpoint.reader import Checkpoint
from prunekit.data.tokens import Tokens
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.models.load import load
from prunekit.models.sequential.pipeline import BATCH_TOKENS
from prunekit.models.units.kinds import NUMBERED
from prunekit.models.units.removal import count_parameters, described_model
from prunekit.models.weight_names import stored_names
from prunekit.runs.distillation import teacher_of
from prunekit.runs.record import Record
from prunekit.runs.stage import Stage
from prunekit.runs.structured.apt import train_adapters
from prunekit.runs.structured.gradual import prune_while_training
from prunekit.runs.structured.ranking import DenseUnits, UnitRanking
from prunekit.runs.structured.unit_run import UnitRun, run_order
from prunekit.runs.structured.unit_scorer import WholeModelScorer
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
from prunekit.runs.training_log import TrainingLog
from prunekit.structured.batches import Batch, mean_loss
from prunekit.structured.blockwise_refit import compensate
from prunekit.structured.finalize import Finalized
from prunekit.structured.unit_gates import Gates
from prunekit.training.teachers import Teacher


class WholeModelRun(UnitRun):
    """A run whose units go while the model is trained.

    It can do all that :mod:`prunekit.runs.structured.trained_run` does, as the reference of that.
    """

    @override
    def _remove_units(self, tokens: Data | None) -> Iterator[Record]:
        plan = self.plan
        if ("shrunk", "") in self.output.journal:
            return
        with self._timed("calibrate"):
            model = load(plan.checkpoint, plan.dtype)
            self.weights_read.require_same(self.ranks)
            model.to(plan.device)  # pyright: ignore
            remember_stored(plan, model)
            before = model.config.to_dict()
            scorer = WholeModelScorer(
                model, _batches(tokens, model, self.ranks), _batches(tokens, model), self.ranks
            )
            texts = training_texts(plan, tokens)
            base = mean_loss(model, texts[1]) if texts else 0.0
        trains_after = texts is not None and not (plan.config.apt or plan.config.prune.gradual)
        teacher = teacher_of(plan, model) if trains_after else None
        training = None
        with ExitStack() as stack:
            ranking = UnitRanking(plan, scorer, stack, self._timed)
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
                if entry["kind"] in NUMBERED
            }
            changed, dropped = config_changes(plan, before, model.config.to_dict(), kept)
            facts = {
                "layers": [ranking.entries[name] for name in run_order(model, ranking.entries)],
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
                tensors = written_tensors(plan, model, kept)
                facts["files"] = self.output.write_shard(1, tensors)
            self.output.append_journal("shrunk", "", facts)

    @override
    def _finish(self, removal: dict[str, Any]) -> None:
        config = self.plan.checkpoint.config | removal["config"]
        config = {key: value for key, value in config.items() if key not in removal["dropped"]}
        smaller = replace(self.plan.checkpoint, config=config)
        self.output.finish(smaller, self.dtype, check=self._check_complete)

    def _check_complete(self, written: Checkpoint) -> None:
        """Refuse a checkpoint that lacks tensors of the model it describes."""
        stored_names(described_model(self.plan.model, written.config), written)

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
        every, dense, log = self._gate_for_training(ranking)
        training = prune_while_training(ranking, every, texts, log)
        rows = yield from self._timed_records("train", training)
        gates, done = ranking.settle(every, dense)
        with self._timed("prune"):
            done += map(ranking.finalize, gates)
        return done, training_facts(base, rows, gradual=True)

    def _train_adapters(
        self, ranking: UnitRanking, texts: Texts, base: float
    ) -> Generator[Record, None, tuple[list[Finalized], dict[str, Any]]]:
        """Train adapters that prune the model and grow, and merge them."""
        every, dense, log = self._gate_for_training(ranking)
        training = train_adapters(ranking, every, dense, texts, log)
        done, rows = yield from self._timed_records("train", training)
        return done, training_facts(base, rows, gradual=True)

    def _gate_for_training(
        self, ranking: UnitRanking
    ) -> tuple[list[Gates], DenseUnits, TrainingLog]:
        """Return gates on all units, their measures, and the training's log."""
        self._widen(ranking.model)
        every = ranking.gate_all()
        dense = ranking.measure(every)
        return every, dense, TrainingLog(self.output, self.plan.training, every)

    def _train(
        self, ranking: UnitRanking, texts: Texts, base: float, teacher: Teacher | None
    ) -> Generator[Record, None, dict[str, Any]]:
        """Train the smaller model; return the facts of it."""
        self._widen(ranking.model)
        kept = {name: entry["kept"] for name, entry in ranking.entries.items()}
        log = TrainingLog(self.output, self.plan.training)
        with adapted(self.plan, ranking.model) as trained:
            training = train_model(self.plan, trained, texts, log, teacher=teacher, kept=kept)
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
        yield Record("phase", how, {"steps": self.plan.block_count}, Stage.PRUNING)
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


def _note(done: list[Finalized]) -> str:
    return next((each.note for each in done if not each.stock), done[0].note)
