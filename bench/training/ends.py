"""Ends of a schedule compared: how much of a training is left after the last pruning.

    python -m bench.training.ends [--again]

gpt2-tinystories, 200 AdamW steps of 8 × 128 tokens, by magnitude to 80 % on a cubic schedule. Each
end is written as soon as it is measured, and not measured again unless ``--again`` is given, so
that the command can be stopped and goes on later. An end takes about 80 seconds on two cores.
"""

import argparse
import json

import torch

from bench.harness.measure import RESULTS, describe, write_json
from bench.training.contestants import gradual
from bench.training.task import Ask, Task, task, train

FILE = RESULTS / "training/ends.json"
STEPS, SPARSITY, SEED = 200, 0.8, 0
SHARES = (0.1, 0.5, 0.8, 1.0)
"""Ends of the schedule, as fractions of the steps."""
MEASURED = "perplexity by end"


def main() -> None:
    """Measure missing ends, and rewrite the results after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="measure all ends anew")
    again = parser.parse_args().again
    if (found := task()) is None:
        return
    what = {"model": found.name, "steps": STEPS, "sparsity": SPARSITY, "seed": SEED}
    before = json.loads(FILE.read_text()) if FILE.is_file() and not again else {}
    same = {key: before.get(key) for key in what} == what
    perplexity = dict(before[MEASURED]) if same else {}
    for share in SHARES:
        if f"{share:g}" in perplexity:
            continue
        perplexity[f"{share:g}"] = measure(found, share)
        machine = {"machine": describe(torch.device("cpu"))}
        write_json(FILE, what | machine | {MEASURED: perplexity})
        print(f"{share:g}", perplexity[f"{share:g}"], flush=True)


def measure(found: Task, share: float) -> float:
    """Return the perplexity after a training with the end at a fraction of its steps."""
    ask = Ask(SPARSITY, end=round(share * STEPS))
    return train(found, gradual("magnitude"), ask, steps=STEPS, seed=SEED)["perplexity"]


if __name__ == "__main__":
    main()
