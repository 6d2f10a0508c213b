"""Remarks where another choice than the config's measured better.

Sources: ``bench/results/quality/quality.md`` and ``gradual.md`` and ``ends.json`` in
``bench/results/training``.
"""

from collections.abc import Mapping

from prunekit.config.run_config import Config
from prunekit.patterns.unstructured import Unstructured

ONE_SHOT = {
    0.6: {"magnitude": 87.6, "wanda": 26.2, "admm": 9.05},
    0.7: {"magnitude": 687.0, "wanda": 115.0, "admm": 15.8},
    0.8: {"magnitude": 6137.0, "wanda": 531.0, "admm": 33.4},
}
"""Perplexity of stories15M by sparsity and method, without training; dense 4.43."""
TRAINED = {
    0.8: {"on a schedule": 23.1, "before the training": 25.9, "admm": 15.7},
    0.9: {"on a schedule": 51.9, "before the training": 54.4, "admm": 25.9},
}
"""Perplexity of gpt2-tinystories by sparsity after 200 steps; dense 10.2. By magnitude, on a cubic
schedule over the first half of the steps or before them, and by admm before them."""
ENDS = {0.1: 25.6, 0.5: 23.1, 0.8: 22.4}
"""Perplexity of gpt2-tinystories by the end of the schedule, a fraction of the 200 steps; 80 %
sparsity by magnitude."""
EARLY = 0.2
"""An end up to this fraction of the steps is remarked."""
FEW_STEPS = 2000
"""From so many steps on, other choices of a trained run were hardly better."""


def remarks(config: Config) -> tuple[str, ...]:
    """Return a remark for each choice than which another measured better."""
    return tuple(each for each in (_on_method(config), _on_end(config)) if each)


def _on_method(config: Config) -> str | None:
    prune, train = config.prune, config.train
    name, sparsity = prune.method.name, prune.sparsity
    if not isinstance(prune.pattern, Unstructured) or sparsity <= 0.5:
        return None
    if train is None:
        nearest, measured = _nearest(ONE_SHOT, sparsity)
        if name != "admm" and name in measured:
            return (
                f"prune.method: at {nearest:.0%} sparsity stories15M had a perplexity of "
                f"{measured[name]:g} by {name}, {measured['admm']:g} by admm (dense 4.43; "
                "bench/results/quality/quality.md)."
            )
    elif name == "magnitude" and train.steps < FEW_STEPS:
        nearest, measured = _nearest(TRAINED, sparsity)
        when = "on a schedule" if prune.end else "before the training"
        return (
            f"prune.method: at {nearest:.0%} sparsity and 200 steps gpt2-tinystories had a "
            f"perplexity of {measured[when]:g} by magnitude {when}, {measured['admm']:g} by "
            "admm before the training, without prune.end (dense 10.2; "
            "bench/results/training/gradual.md)."
        )
    return None


def _on_end(config: Config) -> str | None:
    end, train = config.prune.end, config.train
    if end is None or train is None or train.steps >= FEW_STEPS or end > EARLY * train.steps:
        return None
    if config.prune.schedule == "one-shot" or config.prune.sparsity <= 0.5:
        return None
    found = ", ".join(f"{figure:g} with the end at {share:.0%}" for share, figure in ENDS.items())
    return (
        f"prune.end: step {end} of {train.steps} is early. At 80% sparsity and 200 steps "
        f"gpt2-tinystories had a perplexity of {found} of the steps "
        "(bench/results/training/ends.json)."
    )


def _nearest(
    measured: Mapping[float, dict[str, float]], sparsity: float
) -> tuple[float, dict[str, float]]:
    """Return the measured sparsity next to one, with its figures."""
    nearest = min(measured, key=lambda each: abs(each - sparsity))
    return nearest, measured[nearest]
