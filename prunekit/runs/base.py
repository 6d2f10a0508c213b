"""Base class of runs: texts, evaluation, timing, fingerprint of the journal."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from prunekit.checkpoint import adapter
from prunekit.checkpoint.atomic import file_sha256, write_atomically
from prunekit.checkpoint.hub import CARD
from prunekit.checkpoint.output import OutputFolder, checkpoint_files
from prunekit.checkpoint.reader import Checkpoint, open_checkpoint
from prunekit.data import sources
from prunekit.data.samples import Samples
from prunekit.data.sources import title
from prunekit.data.tokens import Tokens
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.errors import StoppedError
from prunekit.evaluation.generation import sample_text
from prunekit.evaluation.harness import harness_measures
from prunekit.evaluation.perplexity import Evaluator
from prunekit.models import memory
from prunekit.reports import model_card
from prunekit.reports import report as reports
from prunekit.runs import facts
from prunekit.runs.facts import in_report_order
from prunekit.runs.gates import check_gates
from prunekit.runs.identity import WeightDigests, check_weights, fingerprint
from prunekit.runs.plan_base import PlanBase
from prunekit.runs.record import Record, stoppable
from prunekit.runs.stage import Stage
from prunekit.runs.status import STATUS
from prunekit.runs.texts import (
    Data,
    calibration_data,
    evaluation_data,
    measures,
    metrics,
    tasks_of,
)
from prunekit.runs.training_log import state_files

OWN_TEXT = "calibration.json"
"""File of the output folder with the tokens that the dense model wrote, one list per sample."""
P = TypeVar("P", bound=PlanBase)
Result = TypeVar("Result")


class RunBase(ABC, Generic[P]):
    """A run, without the part that prunes the model.

    Attributes:
        plan: The plan that is carried out; its checkpoint digests the tensors that are read.
        output: The output folder, which gets ``shards`` files before they are joined.
        ranks: Processes that share the run.
        weights_read: Digests of the model's tensors that this process reads.
        writes: Names of the files that the run writes, besides shards and journal.
        seconds: Time spent in each phase so far.
        began: Start of the run, by ``time.perf_counter``.
    """

    def __init__(self, plan: P, shards: int, ranks: Ranks = SINGLE) -> None:
        self.weights_read = WeightDigests()
        checkpoint = replace(plan.checkpoint, on_read=self.weights_read.record)
        self.plan: P = replace(plan, checkpoint=checkpoint)
        self.ranks = ranks
        output = plan.config.output
        self.output = OutputFolder(Path(output.path), shards, ranks, output.max_shard_size)
        self.output.weights_read = self.weights_read.take
        self.writes = [*checkpoint_files(plan.checkpoint), *reports.FILES, CARD, OWN_TEXT, STATUS]
        phases = ["calibrate", "prune", "evaluate", "write", "verify"]
        if plan.config.training:
            names = state_files(ranks, sharded=plan.sharded)
            self.writes += [reports.TRAINING, *chain(*names)]
            phases.append("train")
        self.seconds: dict[str, float] = dict.fromkeys(phases, 0.0)
        self.began = time.perf_counter()

    @abstractmethod
    def records(self, *, resume: bool, overwrite: bool) -> Iterator[Record]:
        """Yield the records of the whole run."""

    def stoppable_records(
        self, *, resume: bool, overwrite: bool, stop: Callable[[], bool]
    ) -> Iterator[Record]:
        """Yield the records, and close the output folder at the end.

        Args:
            resume: Continue in an output folder that a stopped run left.
            overwrite: Replace an output folder.
            stop: Called after each record; all ranks stop once it returns True on one.

        Raises:
            StoppedError: ``stop()`` returned True.
        """
        try:
            records = self.records(resume=resume, overwrite=overwrite)
            yield from stoppable(records, lambda: any(self.ranks.all_gather_object(stop())))
        finally:
            self.output.close()

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self.began

    @property
    def dtype(self) -> str | None:
        """Dtype in which weights are written; None for that of the checkpoint."""
        dtype = self.plan.config.model.dtype
        return None if dtype == "auto" else dtype

    def _begin(self, *, resume: bool, overwrite: bool) -> tuple[Data | None, dict[str, Data]]:
        """Claim the output folder; return calibration data and evaluation data by source."""
        if self.plan.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.plan.device)
        with self._timed("calibrate"):
            # On one rank only: a tokenizer uses every core, so several at once only slow each other
            # down.
            tokens, evaluated = self.ranks.run_on_main(self._texts)
        memory.trim_heap()
        self.output.begin(
            fingerprint(self.plan, tokens, evaluated),
            resume=resume,
            overwrite=overwrite,
            writes=self.writes,
        )
        self.ranks.run_on_main(
            lambda: check_weights(self.plan.checkpoint, self.output.journal.values())
        )
        if self.plan.config.calibration and self.plan.config.calibration.self_generated:
            with self._timed("calibrate"):
                tokens = self.ranks.run_on_main(self._own_text)
            memory.trim_heap()
        return tokens, evaluated

    def _own_text(self) -> Tokens:
        """Return generated calibration tokens, reusing those in the output folder."""
        config, length = self.plan.config.calibration, self.plan.lengths[0]
        assert config is not None
        file = self.output.folder / OWN_TEXT
        if ("text", sources.SELF) not in self.output.journal:
            shape = config.samples, length
            ids = sample_text(self.plan.checkpoint, self.plan.device, shape, config.seed)
            write_atomically(file, json.dumps(ids.tolist()).encode())
            digests = {OWN_TEXT: file_sha256(file)}
            self.output.append_journal("text", sources.SELF, {"files": digests})
        return Tokens.of(
            torch.tensor(json.loads(file.read_bytes())),
            f"{config.samples} windows of {length} tokens that the dense model wrote, seed "
            f"{config.seed}",
        )

    def _check_ranks(self, after: str, *, stop: bool) -> None:
        """Compare weights that were read; stop if a rank is to stop.

        Raises:
            CheckpointError: Ranks have read different weights.
            StoppedError: ``stop`` is True on a rank.
        """
        self.weights_read.require_same(self.ranks)
        if any(self.ranks.all_gather_object(stop)):
            raise StoppedError(f"Stopped as asked, after {after}.")

    def _timed(self, phase: str) -> "_Timer":
        return _Timer(self.seconds, phase)

    def _timed_records(
        self, phase: str, records: Generator[Record, None, Result]
    ) -> Generator[Record, None, Result]:
        """Yield records, and add their time to a phase; return their result."""
        with closing(records):
            while True:
                with self._timed(phase):
                    try:
                        record = next(records)
                    except StopIteration as end:
                        return end.value
                yield record

    def _texts(self) -> tuple[Data | None, dict[str, Data]]:
        return calibration_data(self.plan, self.ranks), evaluation_data(self.plan)

    def _evaluate(self, which: str, evaluated: Mapping[str, Data]) -> Iterator[Record]:
        """Measure the model ``"before"`` or ``"after"`` pruning, unless the journal has it."""
        yield from self._evaluate_data(which, evaluated)
        if tasks := tasks_of(self.plan.config.evaluate):
            yield Record("phase", f"tasks {which}", {"steps": 1}, Stage.EVALUATING)
            known = self.output.journal.get(("tasks", which))
            if known is None:
                with self._timed("evaluate"):
                    checkpoint = self._checkpoint(which)
                    device = self.plan.device
                    found = self.ranks.run_on_main(
                        lambda: harness_measures(checkpoint, tasks, device)
                    )
                known = {"measures": [{**each, "which": which} for each in found]}
                self.output.append_journal("tasks", which, known)
            for each in known["measures"]:
                yield Record("evaluation", each["source"], each)

    def _evaluate_data(self, which: str, evaluated: Mapping[str, Data]) -> Iterator[Record]:
        """Measure a model on the data of [evaluate], unless known."""
        if not evaluated:
            return
        steps = len(evaluated) * len(metrics(self.plan))
        yield Record("phase", f"evaluate {which}", {"steps": steps}, Stage.EVALUATING)
        evaluator: Evaluator | None = None
        for source, data in evaluated.items():
            found: dict[str, dict[str, Any]] = {}
            for metric in metrics(self.plan):
                key = f"{which} {source}" + f" {metric}" * isinstance(data, Samples)
                known = self.output.journal.get(("evaluation", key))
                with self._timed("evaluate"):
                    if known is None:
                        evaluator = evaluator or self._evaluator(which)
                        found = found or measures(self.plan, evaluator, data, self.ranks)
                        subject = {"data": title(source), "source": source, "which": which}
                        known = subject | found[metric]
                        self.output.append_journal("evaluation", key, known)
                yield Record("evaluation", source, known)

    def _evaluator(self, which: str) -> Evaluator:
        evaluator = Evaluator(self._checkpoint(which), self.plan.device, self.output.folder)
        if which == "after":
            evaluator.weights.adapters = adapter.read(self.output.folder)
        return evaluator

    def _checkpoint(self, which: str) -> Checkpoint:
        """Return the model before or after pruning."""
        return self.plan.checkpoint if which == "before" else open_checkpoint(self.output.folder)

    def _write_report(self, report: dict[str, Any]) -> dict[str, Any]:
        """Check the gates, write report and model card, and return the report."""
        report = in_report_order(report | {"gates": check_gates(self.plan.config.gates, report)})
        source, _ = model_card.source_facts(self.plan.checkpoint.folder)
        reports.write(report, self.output.folder)
        model_card.write(report, self.output.folder, source)
        self.output.append_journal("finish", "", {"seconds": report["seconds"]["total"]})
        return report

    def _report_frame(self, tokens: Data | None, proof: dict[str, Any]) -> dict[str, Any]:
        """Return the keys of the report that all kinds of runs share."""
        done = self.output.journal
        evaluations = [values for (kind, _), values in done.items() if kind == "evaluation"]
        tasks = [values["measures"] for (kind, _), values in done.items() if kind == "tasks"]
        evaluations += chain(*tasks)
        seconds = {**self.seconds, "total": self.elapsed}
        frame = facts.report_frame(self.plan, tokens, evaluations, seconds)
        digests = self.output.files.items()
        weights = {name: digest for name, digest in digests if name.endswith(".safetensors")}
        notes = [*self.output.notes, *frame["notes"]]
        return frame | {"notes": notes, "files": weights, "proof": proof}


class _Timer:
    """Context manager that adds its seconds to a phase."""

    def __init__(self, seconds: dict[str, float], phase: str) -> None:
        self.seconds, self.phase = seconds, phase

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.phase] += time.perf_counter() - self.began
