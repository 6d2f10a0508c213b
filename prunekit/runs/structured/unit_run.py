"""Base class of structured runs: evaluations, verification, report."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PreTrainedModel
from typing_extensions import override

from prunekit.checkpoint.reader import open_checkpoint
from prunekit.evaluation.verify import make_proof
from prunekit.runs.base import RunBase
from prunekit.runs.record import Record
from prunekit.runs.stage import Stage
from prunekit.runs.structured import result
from prunekit.runs.structured.plan import StructuredPlan
from prunekit.runs.texts import Data
from prunekit.runs.training_log import discard_state


class UnitRun(RunBase[StructuredPlan]):
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
        yield Record("start", "", facts, Stage.CALIBRATING)
        yield from self._evaluate("before", evaluated)
        yield from self._remove_units(tokens)
        removal = self.output.journal["shrunk", ""]
        for entry in removal["layers"]:
            yield Record("layer", entry["name"], entry)
        discard_state(self.output)
        yield Record("phase", "export", {"steps": 1}, Stage.EXPORTING)
        with self._timed("write"):
            self.ranks.run_on_main(lambda: self._finish(removal))
        yield from self._evaluate("after", evaluated)
        yield Record("phase", "verify", {"steps": 1}, Stage.VERIFYING)
        report = self.ranks.run_on_main(lambda: self._verify(tokens, removal))
        yield Record("finish", str(self.output.folder), report)

    @abstractmethod
    def _remove_units(self, tokens: Data | None) -> Iterator[Record]:
        """Rank and remove units and write the weights, unless journaled."""

    @abstractmethod
    def _finish(self, removal: dict[str, Any]) -> None:
        """Write the files that make the shards a checkpoint."""

    def _verify(self, tokens: Data | None, removal: dict[str, Any]) -> dict[str, Any]:
        """Verify the written checkpoint; write and return the report."""
        with self._timed("verify"):
            proof = make_proof(open_checkpoint(self.output.folder), self.plan.device)
        report = result.report(self.plan, self._report_frame(tokens, proof), removal)
        return self._write_report(report)


def run_order(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Return names of modules in the model's order."""
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return sorted(names, key=lambda name: order[name])
