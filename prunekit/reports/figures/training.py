"""Curves of loss, sparsity, gate factors and learning rate."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prunekit import formatting
from prunekit.reports.figures.lines import Axis, Curve, curves
from prunekit.reports.figures.picture import Picture

if TYPE_CHECKING:
    from prunekit.formatting import Number

BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
BAND = {"dots": False, "stairs": True, "band": True}
"""Style of a curve that another one covers where both agree."""
POINTS = 150
"""Maximum number of points of a drawn curve; the data has all."""

Steps = Sequence[Mapping[str, Any]]
"""Rows of the history of a report, one a recorded step."""


def pictures(training: Mapping[str, Any]) -> list[Picture]:
    """Return the figures of the section of a report about training."""
    history = training["history"]
    found = [_losses(training), *_named_curves(history, DISTILLATION), *_sparsities(history)]
    found += [*_named_curves(history, FACTORS), *_named_curves(history, RANKS)]
    if any(step.get("rate") is not None for step in history):
        points = _points(history, "rate")
        line = _curve(BLUE, points, "rate", formatting.number)
        axis = Axis("learning rate", formatting.number, steps=True, salt="rate")
        rows = [{"step": step["step"], "rate": step.get("rate")} for step in history]
        caption = "Of AdamW: a linear warm-up, then a cosine."
        found.append(Picture("Learning rate", curves([line], None, axis), caption, rows, ALT))
    return found


ALT = "Line over steps"


def rows(training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all curves as rows, one a recorded step."""
    history: Steps = training["history"]
    kinds = dict.fromkeys(kind for step in history for kind in step.get("factors") or {})
    names = {"rate": "rate", "sparsity": "asked", "achieved": "counted"}
    present = [key for key in names if any(step.get(key) is not None for step in history)]
    parts = dict.fromkeys(part for step in history for part in step.get("distillation") or {})
    ranks = dict.fromkeys(name for step in history for name in step.get("ranks") or {})
    return [
        {
            **{key: step[key] for key in ("step", "loss", "held_out")},
            **{names[key]: step.get(key) for key in present},
            **{f"factor of {kind}": (step.get("factors") or {}).get(kind) for kind in kinds},
            **{f"{part} loss": (step.get("distillation") or {}).get(part) for part in parts},
            **{f"{name} rank": (step.get("ranks") or {}).get(name) for name in ranks},
        }
        for step in history
    ]


def _losses(training: Mapping[str, Any]) -> Picture:
    history = training["history"]
    held_out = _points(history, "held_out")
    lines = [
        _curve(ORANGE, _points(history, "loss"), "training loss", formatting.number, dots=False),
        _curve(BLUE, held_out, "held-out loss", formatting.number),
    ]
    return Picture(
        "Loss during training",
        curves(
            [line for line in lines if line.points],
            float(training["base"]),
            Axis("loss", formatting.number, wide=True, steps=True, salt="training"),
        ),
        _loss_caption(training),
        [{key: step[key] for key in ("step", "loss", "held_out")} for step in history],
        ALT,
        ((BLUE, "held-out text"), (ORANGE, "training text")),
    )


def _loss_caption(training: Mapping[str, Any]) -> str:
    base, final = (formatting.number(training[key]) for key in ("base", "final"))
    if training["post"] is None:
        return f"Of held-out text: {base} dense (dashed), {final} at best after the last pruning."
    share = _recovered(training["recovery"])
    return (
        f"Of held-out text: {base} dense (dashed), {formatting.number(training['post'])} pruned, "
        f"{final} after the training: {share}."
    )


def _recovered(fraction: float | None) -> str:
    """Return the recovered share of the added loss, in words."""
    if fraction is None:
        return "nothing had been lost"
    if float(fraction) > 1:
        return "more than pruning had added is gone"
    return f"{formatting.percent(fraction)} of the loss recovered"


def _sparsities(history: Steps) -> Iterator[Picture]:
    """Yield the figure of the sparsity, if it changes."""
    asked, counted = _points(history, "sparsity"), _points(history, "achieved")
    if len({value for _, value in asked}) < 2 or not counted:
        return
    yield Picture(
        "Sparsity during training",
        curves(
            [
                _curve(
                    ORANGE,
                    asked,
                    "asked for",
                    formatting.percent,
                    dots=False,
                    stairs=True,
                    band=True,
                ),
                _curve(BLUE, counted, "counted", formatting.percent, stairs=True),
            ],
            None,
            Axis("pruned", formatting.percent, steps=True, salt="sparsity"),
        ),
        f"At the end {formatting.percent(asked[-1][1])} asked for, "
        f"{formatting.percent(counted[-1][1])} counted in the tensors.",
        [
            {"step": step["step"], "asked": step.get("sparsity"), "counted": step.get("achieved")}
            for step in history
        ],
        ALT,
        ((BLUE, "counted"), (ORANGE, "asked for")),
    )


class NamedCurves(NamedTuple):
    """A figure with a curve for each named column.

    Attributes:
        key: The table of each step.
        title: Title of the figure.
        axis: Name of the vertical axis.
        caption: Text below it.
        stairs: Values hold from one step to the next.
    """

    key: str
    title: str
    axis: str
    caption: str
    stairs: bool = True


DISTILLATION = NamedCurves(
    "distillation",
    "Distance from the teacher",
    "loss",
    "On training text: divergence of predictions, and squared distance of the hidden states of "
    "the blocks drawn at that step.",
    stairs=False,
)
FACTORS = NamedCurves(
    "factors",
    "Mean gate factor",
    "mean factor",
    "Mean factor of the gates of each kind of units: 1 is open, 0 removes a unit.",
)
RANKS = NamedCurves(
    "ranks",
    "Ranks of the adapters",
    "rank",
    "Of all adapters: the more important half grows at the end of each window.",
)


def _named_curves(history: Steps, figure: NamedCurves) -> Iterator[Picture]:
    """Yield a figure, if the steps have its table."""
    key, title, axis, caption, stairs = figure
    names = [*dict.fromkeys(name for step in history for name in step.get(key) or {})]
    if not names:
        return
    colours = dict(zip(names, (BLUE, ORANGE, GREEN, PINK), strict=False))
    values = [(step["step"], step.get(key) or {}) for step in history]
    lines = [
        _curve(
            colours[name],
            [(float(step), float(of_step[name])) for step, of_step in values if name in of_step],
            name,
            formatting.number,
            stairs=stairs,
        )
        for name in names
    ]
    yield Picture(
        title,
        curves(lines, None, Axis(axis, formatting.number, steps=True, salt=key)),
        caption,
        [{"step": step, **{name: of_step.get(name) for name in names}} for step, of_step in values],
        ALT,
        tuple((colour, name) for name, colour in colours.items()),
    )


def _points(history: Steps, key: str) -> list[tuple[float, float]]:
    """Return at most ``POINTS`` measured values of a key."""
    found = [
        (float(step["step"]), float(step[key])) for step in history if step.get(key) is not None
    ]
    if len(found) <= POINTS:
        return found
    chosen = {round(place * (len(found) - 1) / (POINTS - 1)) for place in range(POINTS)}
    return [found[place] for place in sorted(chosen)]


def _curve(
    colour: str,
    points: Sequence[tuple[float, float]],
    name: str,
    write: Callable[["Number"], str],
    **style: Any,  # noqa: ANN401  bools, fields of Curve
) -> Curve:
    """Return a curve with a tooltip at each point."""
    tips = [f"step {step:.0f}, {name}: {write(value)}" for step, value in points]
    return Curve(colour, points, tips, **style)
