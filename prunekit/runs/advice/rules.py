"""The rules of ``prunekit advise``, by id."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from prunekit.config.run_config import Config
from prunekit.patterns.base import Grouped
from prunekit.patterns.n_of_m import NOfM
from prunekit.runs.advice.base import Advice, Rule, Subject
from prunekit.runs.advice.measured import FEW_STEPS, MEASURED
from prunekit.statistics import Gram

TOKENS_PER_INPUT = 4
"""Calibration tokens for each input of the widest linear, below which its Gram matrix is poor."""
STORED = {"2:4": 0.5625, "bitmask": 0.5625}
"""Bytes of half of the weights in 16 bits, beside dense ones, by format."""
WIDTH_MULTIPLE = 64


def prunes_nothing(subject: Subject) -> Iterator[Advice]:
    """A sparsity that rounds to no weight at all, or that is 0."""
    prune, sparsity = subject.config.prune, subject.config.prune.sparsity
    if sparsity is None or (sparsity == 0 and getattr(subject.config.output, "quantize", None)):
        return
    nothing = "no unit is removed." if subject.units else "no weight is set to zero."
    if sparsity == 0:
        yield Advice("prune.sparsity", f"0 prunes nothing: {nothing}")
    elif subject.shapes and not any(_pruned_weights(subject, shape) for shape in subject.shapes):
        each = getattr(prune.pattern, "scope", None)
        group = f" of a {each}" if each in {"row", "block"} else ""
        yield Advice(
            "prune.sparsity",
            f"{sparsity:g} of the weights{group} is less than one: {nothing}",
        )


def _pruned_weights(subject: Subject, shape: tuple[int, int]) -> int:
    config = subject.config
    assert isinstance(config, Config)
    sparsity = config.prune.sparsity
    pattern = config.prune.pattern.at(sparsity)
    return sum(pattern.groups(*shape, sparsity).pruned) if isinstance(pattern, Grouped) else 1


def schedule(subject: Subject) -> Iterator[Advice]:
    """More than half of the weights pruned at once before a training."""
    config = subject.config
    if not isinstance(config, Config) or config.train is None:
        return
    if config.train.steps < FEW_STEPS:  # another method measured better there
        return
    prune = config.prune
    at_once = prune.end is None and prune.steps == 1 and prune.recover is None
    if at_once and prune.sparsity > 0.5 and prune.method.name == "magnitude":
        yield Advice(
            "prune.end",
            f"{prune.sparsity:.0%} at once is much. On a cubic schedule over the first half of the "
            "200 steps gpt2-tinystories had a perplexity of 23.1 at 80%, with all zeros before "
            "them 25.9 (bench/results/training/gradual.md).",
            {"prune.end": config.train.steps // 2},
        )


def serving_pattern(subject: Subject) -> Iterator[Advice]:
    """Zeros that no hardware skips, where speed is wanted."""
    config = subject.config
    if subject.goal == "speed" and isinstance(config, Config):
        if isinstance(config.prune.pattern, NOfM) and config.prune.pattern.name in {"2:4", "1:4"}:
            return
        yield Advice(
            "prune.pattern",
            f'"{config.prune.pattern.name}" makes no product faster; GPUs from Ampere on multiply '
            '2:4 weights with sparse tensor cores. Or remove units: pattern = ["heads", '
            '"neurons"].',
            {"prune.pattern": "2:4", "prune.sparsity": None, "prune.allocation": None}
            | {"prune.scope": None, "prune.steps": None},
        )


def storage(subject: Subject) -> Iterator[Advice]:
    """Zeros stored as weights, where memory or speed is wanted."""
    config = subject.config
    if subject.goal not in {"speed", "memory"} or not isinstance(config, Config):
        return
    if config.output.format != "dense" or config.output.quantize:
        return
    if config.prune.recover == "lowrank":
        return
    name = config.prune.pattern.name
    if name in {"2:4", "1:4"} and not config.prune.allocation.mixes:
        kind = "2:4"
    elif subject.goal == "memory" and config.prune.sparsity >= 0.5:
        kind = "bitmask"
    else:
        return
    yield Advice(
        "output.format",
        f'"dense" stores zeros as weights. "{kind}" takes {STORED[kind]} of the bytes at half of '
        "16-bit weights, and is read by transformers with prunekit, and by prunekit convert.",
        {"output.format": kind},
    )


def samples(subject: Subject) -> Iterator[Advice]:
    """Too little calibration text for the width of the model."""
    config = subject.config
    if not isinstance(config, Config) or config.calibration is None or not subject.shapes:
        return
    if config.calibration.task or Gram not in config.prune.method.needs:
        return
    widest = max(inputs for _, inputs in subject.shapes)
    tokens = config.calibration.samples * config.calibration.length
    if tokens < TOKENS_PER_INPUT * widest:
        needed = math.ceil(TOKENS_PER_INPUT * widest / config.calibration.length)
        yield Advice(
            "calibration.samples",
            f"{tokens:,} tokens are {tokens / widest:.1f} for each input of the widest linear "
            f"({widest:,}). The Gram matrix of {config.prune.method.name} has no more rank than "
            f"there are tokens, and below {TOKENS_PER_INPUT} for each input much of it is noise.",
            {"calibration.samples": needed},
        )


def text(subject: Subject) -> Iterator[Advice]:
    """Calibration text that is of no use of the model's."""
    calibration = subject.config.calibration
    if calibration and all(each.startswith("pydoc:") for each in calibration.data):
        change = {"calibration.data": "self"} if subject.writes_text else {}
        yield Advice(
            "calibration.data",
            "is the language reference of Python. Text like that of your use is best, text that "
            "the model writes next: stories260K at 70% had a perplexity of 30.8 on its own domain, "
            "36.0 on its own writing, 40.9 on other text (bench/results/quality/calibration.md).",
            change,
        )


def evaluate(subject: Subject) -> Iterator[Advice]:
    """A run that does not say what was lost."""
    if subject.config.evaluate is None:
        change = {"evaluate.data": ["pydoc:test"], "evaluate.windows": 32}
        yield Advice(
            "evaluate.data",
            "without [evaluate] nothing says what the pruned model has lost.",
            change if subject.writes_text else {},
        )


def widths(subject: Subject) -> Iterator[Advice]:
    """Widths that GPUs multiply slowly, where speed is wanted."""
    prune = subject.units
    narrowed = prune and not {"heads", "neurons", "hidden"}.isdisjoint(prune.pattern)
    if subject.goal == "speed" and prune and narrowed and prune.round_to % WIDTH_MULTIPLE:
        yield Advice(
            "prune.round_to",
            f"GPUs multiply fastest where widths are multiples of {WIDTH_MULTIPLE}.",
            {"prune.round_to": WIDTH_MULTIPLE},
        )


def uniform(subject: Subject) -> Iterator[Advice]:
    """Layers of different widths, which no engine serves, where speed is wanted."""
    prune = subject.units
    if subject.goal == "speed" and prune and prune.pattern != ["blocks"] and not prune.uniform:
        yield Advice(
            "prune.uniform",
            "layers of different widths open with transformers and prunekit alone; uniform = true "
            "makes a folder for every engine.",
            {"prune.uniform": True, "prune.scope": None} if prune.sparsity is not None else {},
        )


def entropy(subject: Subject) -> Iterator[Advice]:
    """Heads by their entropy alone."""
    prune = subject.units
    if prune and prune.method.name == "entropy" and prune.pattern == ["heads"]:
        yield Advice(
            "prune.method",
            "entropy alone measured worse than hybrid and surgeon at every level, and hardly "
            "agrees with the loss without each head (bench/results/structured/README.md).",
            {"prune.method": "hybrid"},
        )


RULES: Mapping[str, Rule] = {
    "prunes-nothing": prunes_nothing,
    **MEASURED,
    "schedule": schedule,
    "serving-pattern": serving_pattern,
    "storage": storage,
    "samples": samples,
    "text": text,
    "evaluate": evaluate,
    "widths": widths,
    "uniform": uniform,
    "entropy": entropy,
}
"""All rules, in the order in which they are followed."""
IN_PLANS = ("prunes-nothing", *MEASURED)
"""Rules that every plan notes."""


def advise(subject: Subject, rules: Mapping[str, Rule] = RULES) -> list[Advice]:
    """Return the advice of all rules that a config does not follow."""
    return [replace(each, rule=name) for name, rule in rules.items() for each in rule(subject)]


def remarks(subject: Subject) -> tuple[str, ...]:
    """Return advice for the notes of a plan."""
    return tuple(map(str, advise(subject, {name: RULES[name] for name in IN_PLANS})))
