"""Perplexity of pruned models by what they were calibrated on: their own domain, other text, self.

    python -m bench.quality.calibration [--models NAME …] [--seeds N]

The models of TinyStories, judged on stories that none of the texts holds; cells that are in
``bench/results/quality/calibration.json`` already are not measured again.
"""

import argparse
import json
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunekit
from bench.jobs.end_to_end import SHARED, Job
from bench.quality.quality import FOLDER, all_jobs, perplexity
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.data.tokens import calibration_tokens, evaluation_tokens
from prunekit.evaluation.generation import write

OTHER = SHARED / "data/wikitext2/valid.tokens.txt"
TEXTS = ("own domain", "other text", "self", "self and other")
TASKS: dict[str, dict[str, Any]] = {
    "70 %": {"pattern": "unstructured", "sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
}


def tokens(job: Job, text: str, seed: int) -> Tensor:
    """Return the calibration samples; of two texts, half of each."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    if text == "self":
        shape = job.samples, job.length
        return write(open_checkpoint(job.model), torch.device("cpu"), shape, seed)
    if text == "self and other":
        half = job.samples // 2
        return torch.cat([tokens(job, each, seed)[:half] for each in ("self", "other text")])
    source = str(job.calibration if text == "own domain" else OTHER)
    return calibration_tokens(tokenizer, [source], job.samples, job.length, seed).ids


def measure(job: Job, task: str, text: str, seed: int) -> float:
    """Return the perplexity of one pruned model."""
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    prunekit.prune(model, tokens(job, text, seed), measure_error=False, **TASKS[task])
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    judged = evaluation_tokens(tokenizer, [str(job.evaluation)], job.length, job.windows)
    return perplexity(model, judged.ids)


def table(cells: dict[str, dict[str, float]]) -> str:
    """Return means over seeds as Markdown."""
    lines = [
        "Perplexity of held-out stories after pruning by the default method, mean over calibration",
        "seeds (their number in brackets). Made by `python -m bench.quality.calibration`.",
        "",
        f"| model | pattern | {' | '.join(TEXTS)} |",
        "|---" * (len(TEXTS) + 2) + "|",
    ]
    for row in dict.fromkeys(name.rpartition(", ")[0] for name in cells):
        found = [cells.get(f"{row}, {text}", {}).values() for text in TEXTS]
        shown = [f"{sum(each) / len(each):.2f} ({len(each)})" if each else "" for each in found]
        model, task = row.split(", ")
        lines.append(f"| {model} | {task} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing and rewrite the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=("stories260K", "gpt2-tinystories"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    file = FOLDER / "calibration.json"
    cells = json.loads(file.read_text()) if file.is_file() else {}
    for seed in range(options.seeds):
        for job in (job for job in all_jobs() if job.name in options.models):
            for task in TASKS:
                for text in TEXTS:
                    found = cells.setdefault(f"{job.name}, {task}, {text}", {})
                    if str(seed) not in found:
                        found[str(seed)] = measure(job, task, text, seed)
                        print(job.name, task, text, seed, found[str(seed)], flush=True)
                        file.write_text(json.dumps(cells, indent=1) + "\n")
                        file.with_suffix(".md").write_text(table(cells))


if __name__ == "__main__":
    main()
