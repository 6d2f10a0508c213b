"""Run that prunes weights before or during training.

Load, evaluate, prune, train, write, evaluate, verify, report, with the whole model in memory. A run
that was stopped while it trained goes on from the training's last saved state; all before that is
done again, except for evaluations.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch.optim import Optimizer
from transformers import PreTrainedModel
from typing_extensions import override

from prunekit.checkpoint.formats import format_named
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.evaluation.verify import make_proof, recount_zeros
from prunekit.models.load import load
from prunekit.models.weight_names import stored_names
from prunekit.runs.base import RunBase
from prunekit.runs.distillation import teacher_of
from prunekit.runs.record import Record
from prunekit.runs.sparsify.shards import LayerRecord, compressed_layouts
from prunekit.runs.stage import Stage
from prunekit.runs.texts import Data, own_batches
from prunekit.runs.trained import result
from prunekit.runs.trained.masking import gradual_pruner, kept_zeros, prune_once
from prunekit.runs.trained.plan import TrainedPlan
from prunekit.runs.trained.written import ModelWriter, gradual_records
from prunekit.runs.training import (
    Texts,
    adapted,
    train_model,
    training_facts,
    training_texts,
)
from prunekit.runs.training_log import Row, TrainingLog, discard_state
from prunekit.structured.batches import Batch, eval_mode, mean_loss
from prunekit.training.gradual import GradualPruner
from prunekit.training.recover import Pruning
from prunekit.training.teachers import Teacher


def run(
    plan: TrainedPlan,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """Carry out a plan and yield its records as they are measured.

    Args:
        plan: From :func:`prunekit.runs.trained.planner.plan`.
        resume: Continue in an output folder that a stopped run left.
        overwrite: Replace an output folder.
        stop: See :meth:`RunBase.stoppable_records`.

    Raises:
        PrunekitError: The run failed; the output folder can be resumed.
    """
    work = TrainedRun(plan)
    yield from work.stoppable_records(resume=resume, overwrite=overwrite, stop=stop)


class TrainedRun(RunBase[TrainedPlan]):
    """One run and its measurements so far."""

    def __init__(self, plan: TrainedPlan) -> None:
        super().__init__(plan, len(plan.blocks) + 1, plan.ranks)

    @override
    def records(self, *, resume: bool, overwrite: bool) -> Iterator[Record]:
        """Yield the records of the whole run."""
        plan = self.plan
        tokens, evaluated = self._begin(resume=resume, overwrite=overwrite)
        assert tokens is not None
        facts = {"blocks": len(plan.blocks), "linears": len(plan.sizes)}
        yield Record("start", "", facts | {"tokens": tokens.tokens}, Stage.CALIBRATING)
        yield from self._evaluate("before", evaluated)
        if ("trained", "") not in self.output.journal:
            yield from self._train(tokens)
        trained = self.output.journal["trained", ""]
        for layer in trained["layers"]:
            yield Record("layer", layer["name"], layer)
        discard_state(self.output)
        yield Record("phase", "export", {"steps": 1}, Stage.EXPORTING)
        with self._timed("write"):
            self.ranks.run_on_main(lambda: self._finish(trained))
        yield from self._evaluate("after", evaluated)
        yield Record("phase", "verify", {"steps": 1}, Stage.VERIFYING)
        report = self.ranks.run_on_main(lambda: self._verify(tokens, trained))
        yield Record("finish", str(self.output.folder), report)

    def _train(self, tokens: Data) -> Iterator[Record]:
        """Prune and train the model, and write its weights."""
        plan = self.plan
        with self._timed("calibrate"):
            model = load(plan.checkpoint, plan.dtype)
            self.weights_read.require_same(self.ranks)
            model.to(plan.device)  # pyright: ignore
            texts = training_texts(plan, tokens)
            assert texts is not None
            with eval_mode(model):
                base = mean_loss(model, texts[1])
            teacher = teacher_of(plan, model)
        batches = own_batches(tokens, plan.device)
        if plan.config.prune.gradual:
            training = self._prune_while_training(model, texts, batches, teacher)
        else:
            training = self._prune_then_train(model, texts, batches, teacher)
        measured, history = yield from training
        facts = training_facts(base, history, gradual=plan.config.prune.gradual is not None)
        with self._timed("write"):
            writer = ModelWriter(plan, model, self.output)
            if plan.sharded:  # rank 0 alone has the weights
                values = self.ranks.run_on_main(lambda: writer.write(measured, writes=True))
            else:
                values = writer.write(measured, writes=self.ranks.is_main)
        self.output.append_journal("trained", "", values | {"training": facts})

    def _prune_then_train(
        self,
        model: PreTrainedModel,
        texts: Texts,
        batches: Sequence[Batch],
        teacher: Teacher | None,
    ) -> Generator[Record, None, tuple[dict[str, LayerRecord], list[Row]]]:
        """Prune the model, then train it under masks."""
        plan = self.plan
        measured = yield from self._timed_records("prune", prune_once(plan, model, batches))
        with adapted(plan, model) as trained:
            masks = partial(kept_zeros, plan, model)
            log = TrainingLog(self.output, plan.training)
            training = train_model(plan, trained, texts, log, masks, teacher)
            history = yield from self._timed_records("train", training)
        return measured, history

    def _prune_while_training(
        self,
        model: PreTrainedModel,
        texts: Texts,
        batches: Sequence[Batch],
        teacher: Teacher | None,
    ) -> Generator[Record, None, tuple[dict[str, LayerRecord], list[Row]]]:
        """Train the model, and prune it on a schedule meanwhile."""
        plan = self.plan
        pruners: list[GradualPruner] = []

        def during(optimizer: Optimizer) -> AbstractContextManager[Pruning]:
            pruners.append(gradual_pruner(plan, model, optimizer, batches))
            return pruners[0]

        with adapted(plan, model) as trained:
            log = TrainingLog(self.output, plan.training)
            training = train_model(plan, trained, texts, log, during, teacher)
            history = yield from self._timed_records("train", training)
        return gradual_records(plan, self._patterns(pruners[0])), history

    def _patterns(self, pruner: GradualPruner) -> dict[str, str]:
        """Return the patterns of linears for which the allocation chose another."""
        run = self.plan.recipe.pattern
        chosen = {name: run.at(value).name for name, value in pruner.sparsities.items()}
        return {name: pattern for name, pattern in chosen.items() if pattern != run.name}

    def _finish(self, trained: dict[str, Any]) -> None:
        """Write the files that make the shards a checkpoint."""
        plan = self.plan
        self.output.finish(
            plan.checkpoint,
            self.dtype,
            format_named(plan.config.output.format),
            compressed_layouts(trained["layers"]),
            check=lambda written: stored_names(plan.model, written),
        )

    def _verify(self, tokens: Data, trained: dict[str, Any]) -> dict[str, Any]:
        """Verify the written checkpoint; write and return the report."""
        with self._timed("verify"):
            written = open_checkpoint(self.output.folder)
            proof = make_proof(written, self.plan.device)
            counted = recount_zeros(
                written, trained["layers"], self.plan.recipe.pattern, self.plan.device
            )
        frame = self._report_frame(tokens, proof)
        report = result.report(self.plan, frame, self.output, trained, counted)
        return self._write_report(report)
