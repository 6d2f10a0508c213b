"""Rankers of heads and neurons compared, and the gain of removal.

    python -m bench.structured.methods [--models NAME …] [--kinds heads neurons]
        [--only CONTESTANT …] [--minutes N]
    python -m bench.structured.methods --speed [--models NAME …]

For every contestant: quality with 10, 30, 50 and 70 % of the units pruned, random with five seeds,
and for heads Spearman's ρ to leave-one-out. Rows already in
``bench/results/structured/<model>.json`` are not measured again, unless their data or the ranker's
settings have changed; so it can be run in pieces, and the machine need not be idle. ``--speed``
measures, with half of the heads and neurons of every layer, tokens per second and bytes of the
folder of the dense, the gated and the smaller model; it does need an idle machine.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import prunekit
from bench.harness.measure import RESULTS, describe, write_json
from bench.structured.speed import speed
from bench.structured.table import LEVELS, Row, page, plot
from bench.structured.tasks import Task, tasks
from prunekit.models.units.kinds import Kind
from prunekit.structured.batches import Batch
from prunekit.structured.blockwise_refit import compensate
from prunekit.structured.rankers import Ranker, Scores, rankers
from prunekit.structured.unit_gates import Gates

FOLDER = RESULTS / "structured"


@dataclass(frozen=True)
class Contestant:
    """A ranker, and how its scores are carried out.

    Attributes:
        ranker: Name of the ranker.
        settings: Its settings.
        refit: The linears that read the units are refitted.
        rounds: The remaining units are ranked again after each tenth is pruned.
        seeds: Number of seeds to measure.
    """

    ranker: str
    settings: dict[str, Any] = field(default_factory=dict)
    refit: bool = False
    rounds: bool = False
    seeds: int = 1

    def made(self, seed: int) -> Ranker:
        """Return its ranker."""
        seeded = {"seed": seed} if self.ranker == "random" else {}
        return rankers()[self.ranker](**self.settings, **seeded)

    def described(self, kind: Kind) -> Row | None:
        """Return all its settings; None if it does not rank such units."""
        made = self.made(0)
        if any(kind not in part.kinds for part in made.components):
            return None
        return {**made.model_dump(), "refit": self.refit, "rounds": self.rounds}


OUTPUT_AND_GRADIENT = {"of": {"output-norm": 1.0, "gradient": 1.0}, "by": "z-score"}
CONTESTANTS = {
    "random": Contestant("random", seeds=5),
    "entropy": Contestant("entropy"),
    "magnitude": Contestant("magnitude"),
    "gradient": Contestant("gradient"),
    "leave-one-out": Contestant("leave-one-out"),
    "obs": Contestant("obs"),
    "obs + refit": Contestant("obs", refit=True),
    "surgeon": Contestant("surgeon"),
    "surgeon + refit": Contestant("surgeon", refit=True),
    "gradient + refit": Contestant("gradient", refit=True),
    "hybrid": Contestant("hybrid"),
    "hybrid + refit": Contestant("hybrid", refit=True),
    "hybrid of output-norm and gradient": Contestant("hybrid", OUTPUT_AND_GRADIENT),
    "hybrid of output-norm and gradient + refit": Contestant(
        "hybrid", OUTPUT_AND_GRADIENT, refit=True
    ),
    "flap": Contestant("flap"),
    "llm-pruner": Contestant("llm-pruner"),
    "output-norm": Contestant("output-norm"),
    "salience": Contestant("salience"),
    "random + refit": Contestant("random", refit=True),
    "obs in rounds + refit": Contestant("obs", refit=True, rounds=True),
}
FOR_HEADS = ("leave-one-out",)  # one run per unit; neurons are too many


class Bench:
    """One model and one kind of its units, loaded on demand."""

    def __init__(self, task: Task, kind: Kind) -> None:
        self.task, self.kind = task, kind
        self._known: dict[tuple[str, str, bool], Scores] = {}

    @cached_property
    def gates(self) -> Gates:
        """Gates on the dense model."""
        return getattr(prunekit, self.kind)(self.task.load())

    def row(self, contestant: Contestant, seed: int) -> Row:
        """Measure a contestant at every level; each layer keeps one unit."""
        began = time.perf_counter()
        levels = [min(level, self._most) for level in LEVELS]
        scores = self._scores(contestant.made(seed), rounds=contestant.rounds)
        found = [self._quality(scores, level, refit=contestant.refit) for level in levels]
        row: Row = {"levels": levels, "quality": found, "units": self._units}
        if self.kind == "heads":
            row["scores"] = torch.cat([*scores.values()]).tolist()
        return row | {"seconds": time.perf_counter() - began}

    @property
    def _units(self) -> int:
        return sum(site.units for site in self.gates.linear_groups)

    @property
    def _most(self) -> float:
        """The fraction of units that can be pruned."""
        return 1 - len(self.gates.linear_groups) / self._units

    def _scores(self, ranker: Ranker, *, rounds: bool) -> Scores:
        data = self.task.few if ranker.name == "leave-one-out" else self.task.calibration
        key = (ranker.name, ranker.model_dump_json(), rounds)
        if key not in self._known:
            order = self._order if rounds else self.gates.score
            self._known[key] = order(ranker, data)
        return self._known[key]

    def _order(self, ranker: Ranker, data: list[Batch]) -> Scores:
        """Return the removal order as scores, ranking again each round."""
        most = min(max(LEVELS), self._most)
        gone = self.gates.prune_in_steps(ranker, data, most, steps=round(10 * most))
        self.gates.undo()
        scores = {
            site.name: torch.full((site.units,), float(len(gone)), dtype=torch.float64)
            for site in self.gates.linear_groups
        }
        for place, (layer, unit, _) in enumerate(gone):
            scores[self.gates.linear_groups[layer].name][unit] = place
        return scores

    def _quality(self, scores: Scores, level: float, *, refit: bool) -> float:
        gates = getattr(prunekit, self.kind)(self.task.load()) if refit else self.gates
        gates.prune(scores, level)
        if refit:
            return self.task.quality(self._refitted(gates))
        found = self.task.quality(gates.model)
        gates.undo()
        return found

    def _refitted(self, gates: Gates) -> PreTrainedModel:
        if self.task.metric != "perplexity":
            gates.finalize(self.task.calibration)
        else:  # in one pass, as the engine does
            gates.detach()
            batches = self.task.calibration
            for _ in compensate(gates.model, gates.linear_groups, gates.kept, batches):
                pass
        return gates.model


def measure(task: Task, kind: Kind, known: list[Row], only: list[str]) -> Iterator[Row]:
    """Yield missing rows of a model and kind, by contestant and seed."""
    bench = Bench(task, kind)
    have = {_key(row) for row in known}
    base = {"model": task.name, "kind": kind, "metric": task.metric, "protocol": task.protocol}
    for name, contestant in CONTESTANTS.items():
        settings = contestant.described(kind)
        if only and name not in only:
            continue
        if settings is None or (kind != "heads" and name in FOR_HEADS):
            continue
        for seed in range(contestant.seeds):
            row = base | {"contestant": name, "seed": seed, "settings": settings}
            if _key(row) not in have:
                yield row | bench.row(contestant, seed)


def _key(row: Row) -> str:
    names = ("model", "kind", "contestant", "seed", "settings", "protocol")
    return json.dumps([row[name] for name in names], sort_keys=True)


def save(found: dict[str, Any], file: Path) -> None:
    """Write the results of a model, and the page of all models."""
    write_json(file, found)
    (file.parent / "structured.md").write_text(page(recorded()))


def recorded() -> list[dict[str, Any]]:
    """Return the results of each model."""
    return [json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))]


def main() -> None:
    """Measure missing rows and rewrite the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", help="only these")
    parser.add_argument("--kinds", nargs="*", default=["heads", "neurons"])
    parser.add_argument("--only", nargs="*", default=[], help="only these contestants")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after these")
    parser.add_argument("--speed", action="store_true", help="speed and size, not quality")
    run(parser.parse_args())
    plot(recorded(), FOLDER / "structured.png")


def run(options: argparse.Namespace) -> None:
    """Measure the chosen missing rows until time runs out."""
    began = time.monotonic()
    for task in tasks(options.models):
        file = FOLDER / f"{task.name}.json"
        found: Row = {"rows": [], "speed": []}
        if file.is_file():
            found = json.loads(file.read_text())
        found["model"] = task.name
        found["machine"] = describe(torch.device("cpu"))
        if options.speed:
            found["speed"] = [*speed(task)]
            save(found, file)
            continue
        found.setdefault("dense", task.quality(task.load()))
        for kind in options.kinds:
            for row in measure(task, kind, found["rows"], options.only):
                same = ("kind", "contestant", "seed")
                others = [r for r in found["rows"] if any(r[name] != row[name] for name in same)]
                found["rows"] = [*others, row]
                save(found, file)
                print(row["model"], kind, row["contestant"], row["quality"], flush=True)
                if time.monotonic() - began > 60 * options.minutes:
                    return


if __name__ == "__main__":
    main()
