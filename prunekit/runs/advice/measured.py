"""Rules whose figures were measured.

Sources: ``bench/results/quality/quality.md`` and ``gradual.md`` and ``ends.json`` in
``bench/results/training``.
"""

from collections.abc import Iterator, Mapping

from typing_extensions import TypeIs

from prunekit.config.run_config import Config
from prunekit.patterns.unstructured import Unstructured
from prunekit.runs.advice.base import Advice, Change, Rule, Subject

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


def method(subject: Subject) -> Iterator[Advice]:
    """A method that measured worse, without training."""
    config = subject.config
    if not _is_sparse(config) or config.train is not None:
        return
    name = config.prune.method.name
    nearest, measured = _nearest(ONE_SHOT, config.prune.sparsity)
    if name != "admm" and name in measured:
        yield Advice(
            "prune.method",
            f"at {nearest:.0%} sparsity stories15M had a perplexity of {measured[name]:g} by "
            f"{name}, {measured['admm']:g} by admm (dense 4.43; bench/results/quality/quality.md).",
            _instead(subject, config),
        )


def trained_method(subject: Subject) -> Iterator[Advice]:
    """Magnitude before or during a short training."""
    config = subject.config
    if not _is_sparse(config) or config.train is None or config.train.steps >= FEW_STEPS:
        return
    if config.prune.method.name == "magnitude":
        nearest, measured = _nearest(TRAINED, config.prune.sparsity)
        when = "on a schedule" if config.prune.end else "before the training"
        yield Advice(
            "prune.method",
            f"at {nearest:.0%} sparsity and 200 steps gpt2-tinystories had a perplexity of "
            f"{measured[when]:g} by magnitude {when}, {measured['admm']:g} by admm before the "
            "training, without prune.end (dense 10.2; bench/results/training/gradual.md).",
            {**_instead(subject, config), **dict.fromkeys(OF_SCHEDULES)},
        )


def early_end(subject: Subject) -> Iterator[Advice]:
    """A schedule that ends early in a short training."""
    config = subject.config
    if not isinstance(config, Config) or config.prune.end is None or config.train is None:
        return
    end, steps = config.prune.end, config.train.steps
    if steps >= FEW_STEPS or end > EARLY * steps:
        return
    if config.prune.schedule == "one-shot" or config.prune.sparsity <= 0.5:
        return
    found = ", ".join(f"{figure:g} with the end at {share:.0%}" for share, figure in ENDS.items())
    yield Advice(
        "prune.end",
        f"step {end} of {steps} is early. At 80% sparsity and 200 steps gpt2-tinystories had a "
        f"perplexity of {found} of the steps (bench/results/training/ends.json).",
        {"prune.end": round(0.8 * steps)},
    )


def _is_sparse(config: object) -> TypeIs[Config]:
    """Return whether more than half of the weights go, wherever they are."""
    return (
        isinstance(config, Config)
        and isinstance(config.prune.pattern, Unstructured)
        and config.prune.sparsity > 0.5
    )


def _instead(subject: Subject, config: Config) -> Change:
    """Return the change to the default method, without the settings of another."""
    settings = type(config.prune.method).model_fields
    text = "self" if subject.writes_text else "pydoc:train"
    needed = {} if config.calibration else {"calibration.data": text}
    return needed | {"prune.method": "admm"} | {f"prune.{key}": None for key in settings}


def _nearest(
    measured: Mapping[float, dict[str, float]], sparsity: float
) -> tuple[float, dict[str, float]]:
    """Return the measured sparsity next to one, with its figures."""
    nearest = min(measured, key=lambda each: abs(each - sparsity))
    return nearest, measured[nearest]


OF_SCHEDULES = tuple(
    f"prune.{key}"
    for key in ("end", "start", "every", "schedule", "initial_sparsity", "regrow", "regrow_every")
)
"""Keys that prune while a model trains."""
MEASURED: Mapping[str, Rule] = {
    "method": method,
    "trained-method": trained_method,
    "early-end": early_end,
}
"""The rules by id."""
