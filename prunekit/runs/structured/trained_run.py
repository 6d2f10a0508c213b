"""Structured run that removes units by block, then trains the model.

The ranking is journaled. A run that was stopped later compensates again, and its training continues
from the last saved state.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel
from typing_extensions import override

from prunekit.checkpoint.reader import Checkpoint
from prunekit.models.experts import unfused
from prunekit.models.load import load
from prunekit.runs.distillation import teacher_of
from prunekit.runs.record import Record
from prunekit.runs.stage import Stage
from prunekit.runs.structured.blockwise_run import BlockwiseRun
from prunekit.runs.structured.shards import UnitShards
from prunekit.runs.structured.smaller_model import SmallerModel
from prunekit.runs.texts import Data
from prunekit.runs.training import Texts, adapted, train_model, training_facts, training_texts
from prunekit.runs.training_log import TrainingLog
from prunekit.structured.batches import mean_loss
from prunekit.training.teachers import Teacher


class TrainedRun(BlockwiseRun):
    """A run that removes units once and trains the smaller model."""

    @override
    def _remove_units(self, tokens: Data | None) -> Iterator[Record]:
        plan, smaller = self.plan, (yield from self._ranked(tokens))
        shards = self._shards = UnitShards(plan, smaller, self.output)
        shards.announce()
        facts = self.output.journal["shrunk", ""]
        if facts["training"] is not None:
            return
        texts = training_texts(plan, tokens)
        assert texts is not None
        with self._timed("calibrate"):
            model = _in_memory(smaller.checkpoint).to(plan.device)  # pyright: ignore
        yield from self._compensate(model, smaller, tokens)
        with self._timed("calibrate"):
            base, teacher = self._dense_loss(texts)
        kept = {entry["name"]: entry["kept"] for entry in facts["layers"]}
        log = TrainingLog(self.output, plan.training)
        with adapted(plan, model) as trained:
            training = train_model(plan, trained, texts, log, teacher=teacher, kept=kept)
            rows = yield from self._timed_records("train", training)
        with self._timed("write"):
            files = self.ranks.run_on_main(lambda: shards.write_model(model))
            written = {"training": training_facts(base, rows, gradual=False), "files": files}
            self.output.append_journal("shrunk", "", facts | written)

    def _dense_loss(self, texts: Texts) -> tuple[float, Teacher | None]:
        """Return the dense model's held-out loss, and it as a teacher."""
        plan = self.plan
        dense = load(plan.checkpoint, plan.dtype).to(plan.device)  # pyright: ignore
        self.weights_read.require_same(self.ranks)
        loss = mean_loss(dense, texts[1])
        # Copied and widened in main memory: the smaller model is on the device.
        teacher = teacher_of(plan, dense.cpu())  # pyright: ignore
        if teacher:
            teacher.model.to(plan.device)  # pyright: ignore
        return loss, teacher

    def _compensate(
        self, model: PreTrainedModel, smaller: SmallerModel, tokens: Data | None
    ) -> Iterator[Record]:
        """Give the model in memory the weights that compensate for removed units."""
        blocks = self._compensated(tokens)
        if blocks is None:
            return
        yield Record(
            "phase",
            self.plan.config.prune.compensate,
            {"steps": len(self._block_names)},
            Stage.PRUNING,
        )
        with unfused(model):
            values = model.state_dict(keep_vars=True)
        for name in self._block_names:
            with self._timed("prune"), torch.no_grad():
                for changed, whole in (next(blocks).changed or {}).items():
                    part = smaller.cut(changed, whole.detach())
                    before = values[changed]
                    # What is only rounded, such as a bias, stays as it was stored.
                    if part is not None and not torch.equal(before.to(part), part):
                        before.copy_(part)
            yield Record("step", name)

    @property
    def _block_names(self) -> Sequence[str]:
        """Names of the blocks that are left."""
        assert self._shards is not None
        return self._shards.blocks


def _in_memory(checkpoint: Checkpoint) -> PreTrainedModel:
    """Load a model in float32 whose config is in no file yet."""
    with TemporaryDirectory(prefix="prunekit-") as folder:
        Path(folder, "config.json").write_text(json.dumps(checkpoint.config), encoding="utf-8")
        return load(replace(checkpoint, folder=Path(folder)), torch.float32)
