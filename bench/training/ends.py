"""Ends of a schedule compared: how much of a training is left after the last pruning.

    python -m bench.training.ends

gpt2-tinystories, 200 AdamW steps of 8 × 128 tokens, by magnitude to 80 % on a cubic schedule.
"""

import torch

from bench.harness.measure import RESULTS, describe, write_json
from bench.training.contestants import gradual
from bench.training.task import Ask, task, train

FILE = RESULTS / "training/ends.json"
STEPS, SPARSITY = 200, 0.8
SHARES = (0.1, 0.5, 0.8, 1.0)
"""Ends of the schedule, as fractions of the steps."""


def main() -> None:
    """Measure each end, and rewrite the results."""
    if (found := task()) is None:
        return
    perplexity = {
        f"{share:g}": train(
            found,
            gradual("magnitude"),
            Ask(SPARSITY, end=round(share * STEPS)),
            steps=STEPS,
            seed=0,
        )["perplexity"]
        for share in SHARES
    }
    what = {"model": found.name, "steps": STEPS, "sparsity": SPARSITY, "seed": 0}
    results = what | {"machine": describe(torch.device("cpu")), "perplexity by end": perplexity}
    write_json(FILE, results)


if __name__ == "__main__":
    main()
