"""Rankers of heads and neurons beside each other and random, and what removal is worth.

    python -m bench.structured [--models NAME …] [--kinds heads neurons] [--no-speed]

For every ranker: quality with 10, 30, 50 and 70 % of the units gated off (``obs + refit`` removes
them and refits), random with mean and deviation of five seeds, and Spearman's ρ to leave-one-out.
Then, with half of the heads and neurons of every layer: tokens a second and bytes of the folder of
the dense, the gated and the smaller model. Speed needs an idle machine, quality does not.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

import prunekit
from bench.end_to_end import SHARED
from bench.harness import RESULTS, describe
from bench.quality import all_jobs
from prunekit.agreement import spearman
from prunekit.data import calibration_tokens, evaluation_tokens
from prunekit.errors import ConfigError
from prunekit.gated import Gates
from prunekit.probes.batches import IGNORED, Batch, mean_loss
from prunekit.rankers import Scores, rankers

LEVELS = (0.1, 0.3, 0.5, 0.7)
STEPWISE = ("gradient", "obs")  # also scored anew after each twentieth of the units is gone
SEEDS = range(5)
WINDOWS = 40  # of evaluation text: some sixty variants of each model are judged on it
RANKERS: dict[str, dict[str, Any]] = {
    "entropy": {},
    "magnitude": {},
    "gradient": {},
    "output-norm": {},
    "salience": {},
    "obs": {},
    "hybrid": {},
    "hybrid of entropy and gradient": {"of": {"entropy": 0.7, "gradient": 0.3}},
    "leave-one-out": {},
}
FOR_HEADS = ("entropy", "hybrid of entropy and gradient", "leave-one-out")
PROMPT, WRITTEN, RUNS = 64, 64, 5


@dataclass(frozen=True)
class Task:
    """A model, what its units are scored on, and what it is judged on.

    ``few`` is for what runs the model once a unit; ``metric`` is perplexity, or the accuracy that
    a sample counts for whose every prediction is right.
    """

    name: str
    model: Path
    calibration: list[Batch]
    few: list[Batch]
    evaluation: list[Batch]
    metric: str

    def load(self) -> PreTrainedModel:
        """Return the dense model in float32."""
        return prunekit.load(self.model, torch.float32)

    def quality(self, model: PreTrainedModel) -> float:
        """Judge a model."""
        if self.metric == "perplexity":
            return float(torch.tensor(mean_loss(model, self.evaluation)).exp())
        return _accuracy(model, self.evaluation)


def _accuracy(model: PreTrainedModel, batches: list[Batch]) -> float:
    right = total = 0
    for batch in batches:
        labels = batch["labels"]
        with torch.inference_mode():
            found = model(**batch).logits.argmax(-1)
        if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
            found, labels = found[:, :-1], labels[:, 1:]
        same = (found == labels) | (labels == IGNORED)
        right += int(same.view(len(labels), -1).all(1).sum())
        total += len(labels)
    return right / total


def tasks(wanted: list[str] | None) -> Iterator[Task]:
    """Yield every model that is here, with its task."""
    for job in all_jobs():
        if not wanted or job.name in wanted:
            tokenizer = AutoTokenizer.from_pretrained(job.model)
            source = [str(job.calibration)]
            ids = calibration_tokens(tokenizer, source, job.samples, job.length, 0).ids
            text = evaluation_tokens(tokenizer, [str(job.evaluation)], job.length, WINDOWS).ids
            read, judged = ([{"input_ids": p} for p in part.split(4)] for part in (ids, text))
            yield Task(job.name, job.model, read, read[:4], judged, "perplexity")
    labelled = {
        "minilm-l6-sst2": _sentences,
        "gpt2-nano-sort": _digits,
        "t5-nano-sort": _letters,
    }
    for name, make in labelled.items():
        if (SHARED / "models" / name).is_dir() and (not wanted or name in wanted):
            read, judged = make(SHARED / "models" / name)
            yield Task(name, SHARED / "models" / name, read, read[:4], judged, "accuracy")


def _sentences(model: Path) -> tuple[list[Batch], list[Batch]]:
    """Return SST-2: 256 samples of the training set, and the whole development set."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def batches(file: str, count: int | None) -> list[Batch]:
        lines = (SHARED / "data/sst2" / file).read_text().splitlines()[1:][:count]
        rows = [line.split("\t") for line in lines]
        return [
            {
                **tokenizer([row[0] for row in part], padding=True, return_tensors="pt"),
                "labels": torch.tensor([int(row[1]) for row in part]),
            }
            for part in (rows[start : start + 32] for start in range(0, len(rows), 32))
        ]

    return batches("train_12k.tsv", 256), batches("dev.tsv", None)


def _digits(_: Path) -> tuple[list[Batch], list[Batch]]:
    """Return all inputs of the sorter of six digits, a third of them to calibrate on."""
    digits = torch.cartesian_prod(*[torch.arange(3)] * 6)
    whole = torch.cat([digits, digits.sort(1).values], 1)
    labels = whole.clone()
    labels[:, :6] = IGNORED
    batch = {"input_ids": whole[:, :-1], "labels": labels[:, :-1]}
    third = {name: part[::3] for name, part in batch.items()}
    return [third], [batch]


def _letters(model: Path) -> tuple[list[Batch], list[Batch]]:
    """Return random strings of 4 to 16 letters and, as labels, the same letters in order."""
    tokenizer, choice = AutoTokenizer.from_pretrained(model), random.Random(0)
    words = ["".join(choice.choices(ascii_lowercase, k=choice.randint(4, 16))) for _ in range(800)]
    batches = []
    for start in range(0, len(words), 100):
        part = words[start : start + 100]
        batch = tokenizer(part, padding=True, return_tensors="pt")
        answers = tokenizer(["".join(sorted(word)) for word in part], padding=True)
        labels = torch.tensor(answers["input_ids"])
        padding = torch.tensor(answers["attention_mask"]) == 0
        batches.append({**batch, "labels": labels.masked_fill(padding, IGNORED)})
    return batches[:3], batches[3:]


def measure(task: Task, kind: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each ranker: quality by level, and ρ to leave-one-out."""
    model = task.load()
    gates: Gates = getattr(prunekit, kind)(model)
    base = {"model": task.name, "kind": kind, "metric": task.metric, "units": gates.active()}
    yield base | {"ranker": "dense", "quality": [task.quality(model)] * len(LEVELS)}
    names = [name for name in RANKERS if kind == "heads" or name not in FOR_HEADS]
    scores = {name: _score(task, gates, name) for name in names}
    for name in names:
        row = base | {"ranker": name, "quality": _levels(task, gates, scores[name])}
        if kind == "heads":
            row["rho"] = spearman(scores[name], scores["leave-one-out"])
        yield row
    for name in STEPWISE:
        found = [_stepwise(task, gates, name, level) for level in LEVELS]
        yield base | {"ranker": f"{name}, in steps", "quality": found}
    seeds = [_levels(task, gates, gates.score("random", seed=seed)) for seed in SEEDS]
    spread = [
        [found[index] for found in seeds if found[index] is not None]
        for index in range(len(LEVELS))
    ]
    yield base | {
        "ranker": "random",
        "quality": [statistics.mean(found) if found else None for found in spread],
        "deviation": [statistics.stdev(found) if found else None for found in spread],
    }
    refitted = [_refitted(task, kind, scores["obs"], level) for level in LEVELS]
    yield base | {"ranker": "obs + refit", "quality": refitted}


def _score(task: Task, gates: Gates, name: str) -> Scores:
    ranker = "hybrid" if name.startswith("hybrid") else name
    data = task.few if name == "leave-one-out" else task.calibration
    return gates.score(ranker, data, **RANKERS[name])


def _levels(task: Task, gates: Gates, scores: Scores) -> list[float | None]:
    found: list[float | None] = []
    for level in LEVELS:
        try:
            gates.prune(scores, level)
        except ConfigError:  # every layer keeps a unit, and there are too few for this level
            found.append(None)
            continue
        found.append(task.quality(gates.model))
        gates.undo()
    return found


def _stepwise(task: Task, gates: Gates, name: str, level: float) -> float | None:
    try:
        gates.prune_in_steps(rankers()[name](), task.calibration, level, steps=round(level * 20))
    except ConfigError:  # as above
        return None
    found = task.quality(gates.model)
    gates.undo()
    return found


def _refitted(task: Task, kind: str, scores: Scores, level: float) -> float | None:
    model = task.load()
    gates: Gates = getattr(prunekit, kind)(model)
    try:
        gates.prune(scores, level)
    except ConfigError:
        return None
    gates.finalize(task.calibration)
    return task.quality(model)


def speed(task: Task) -> Iterator[dict[str, Any]]:
    """Yield tokens a second and bytes of a folder: dense, half gated off, half removed."""
    model = task.load()
    yield _speed(task, model, "dense")
    both = [prunekit.heads(model), prunekit.neurons(model)]
    for gates in both:
        gates.prune(gates.score("output-norm", task.calibration), 0.5, scope="layer")
    yield _speed(task, model, "gated")
    stock = [gates.finalize().stock for gates in both]
    for gates in both:
        gates.detach()
    yield _speed(task, model, "removed") | {"stock": all(stock)}


def _speed(task: Task, model: PreTrainedModel, name: str) -> dict[str, Any]:
    batch = {key: part[:1] for key, part in task.evaluation[0].items()}
    tokens = batch["input_ids"].shape[1]
    row: dict[str, Any] = {"model": task.name, "variant": name}
    row["parameters"] = model.num_parameters()
    row["quality"] = task.quality(model)
    row["read"] = tokens / _seconds(lambda: model(**batch))
    if task.metric == "perplexity":
        ids = batch["input_ids"][:, :PROMPT]
        limits = {"min_new_tokens": WRITTEN, "max_new_tokens": WRITTEN, "do_sample": False}
        alone = _seconds(lambda: model(input_ids=ids))
        whole = _seconds(lambda: model.generate(ids, pad_token_id=0, **limits))  # pyright: ignore
        row["write"] = (WRITTEN - 1) / max(whole - alone, 1e-9)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        row["bytes"] = sum(file.stat().st_size for file in Path(folder).iterdir())
    return row


def _seconds(call: Callable[[], object]) -> float:
    with torch.inference_mode():
        call()
        found = []
        for _ in range(RUNS):
            began = time.perf_counter()
            call()
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def _cell(value: float | None, deviation: float | None = None) -> str:
    if value is None:
        return "—"
    return f"{value:.4g}" + (f" ± {deviation:.2g}" if deviation is not None else "")


def _quality_line(row: dict[str, Any]) -> str:
    deviations = row.get("deviation", [None] * len(LEVELS))
    cells = [_cell(*pair) for pair in zip(row["quality"], deviations, strict=True)]
    what = f"{row['units']} {row['kind']}"
    names = [row["model"], what, row["metric"], row["ranker"]]
    return f"| {' | '.join([*names, *cells, _cell(row.get('rho'))])} |"


def _speed_line(row: dict[str, Any]) -> str:
    keys = ("parameters", "quality", "read", "write", "bytes")
    cells = [f"{row[key]:,.4g}" if key in row else "—" for key in keys]
    return f"| {' | '.join([row['model'], row['variant'], *cells])} |"


def main() -> None:
    """Measure and rewrite ``bench/results/<machine>/structured.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", help="only these")
    parser.add_argument("--kinds", nargs="*", default=["heads", "neurons"])
    parser.add_argument("--no-speed", action="store_true", help="quality alone")
    parser.add_argument("--out", type=Path, help="folder, if not that of this machine's results")
    options = parser.parse_args()
    header = ["model", "units", "metric", "ranker", *(f"{level:.0%}" for level in LEVELS), "ρ"]
    lines, quality, timed = [_header(header)], [], []
    for task in tasks(options.models):
        for kind in options.kinds:
            for row in measure(task, kind):
                quality.append(row)
                print(_quality_line(row), flush=True)
        if not options.no_speed:
            for row in speed(task):
                timed.append(row)
                print(_speed_line(row), flush=True)
    lines += [*map(_quality_line, quality)]
    if timed:
        names = ["model", "half of heads and neurons", "parameters", "quality"]
        names += ["tokens/s read", "tokens/s written", "bytes"]
        lines += ["", _header(names), *map(_speed_line, timed)]
    machine = describe(torch.device("cpu"))
    folder = options.out or RESULTS / machine["name"]
    folder.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine, "levels": LEVELS, "quality": quality, "speed": timed}
    (folder / "structured.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "structured.md").write_text("\n".join(lines) + "\n")


def _header(names: list[str]) -> str:
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


if __name__ == "__main__":
    main()
