"""Heat maps of units: a row for each layer, a square for each unit, those that went in red."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunekit import formatting
from prunekit.reports.figures.draw import Axis, Cell, Curve, Grid, Scale, curves, draw
from prunekit.reports.figures.layers import block_labels, linear_labels, split
from prunekit.reports.figures.picture import Picture

if TYPE_CHECKING:
    from matplotlib.ticker import Formatter

LARGEST = 128
"""Units of a layer that can be told apart in a picture."""

GONE = "#d62828"


def maps(layers: Sequence[dict[str, Any]], agreement: Mapping[str, float]) -> list[Picture]:
    """Return each heat map that there is something to show in.

    Args:
        layers: Those of a report.
        agreement: Spearman's ρ of the ranker to the truth, by kind of unit, where it was measured.
    """
    found = []
    for kind in dict.fromkeys(layer["kind"] for layer in layers):
        of_kind = [layer for layer in layers if layer["kind"] == kind]
        if max(layer["units"] for layer in of_kind) > LARGEST:
            continue
        gone = sum(layer["units"] - len(layer["kept"]) for layer in of_kind)
        framed = f"Framed: the {gone} {kind} that went."
        found.append(
            Picture(
                f"{kind.capitalize()} by score",
                _map(
                    of_kind,
                    "score",
                    _shares({layer["name"]: layer["scores"] for layer in of_kind}),
                    "share of scores that are lower",
                ),
                f"What the ranker made of the model before anything went. {framed}",
                rows(of_kind),
                f"Heat map, blocks by {kind}",
            )
        )
        if kind in agreement:
            truths = {layer["name"]: layer["truth"] for layer in of_kind}
            found.append(
                Picture(
                    f"Loss without each of the {kind}",
                    _map(
                        of_kind,
                        "rise of the loss",
                        _shares(truths),
                        "share of rises that are lower",
                    ),
                    f"The truth that the score stands for: Spearman's ρ of both is "
                    f"{formatting.number(agreement[kind])}. {framed}",
                    _each(truths, "unit", "rise"),
                    f"Heat map, blocks by {kind}",
                )
            )
        if all(layer.get("entropy") for layer in of_kind):
            entropies = {layer["name"]: layer["entropy"] for layer in of_kind}
            found.append(
                Picture(
                    "Attention entropy",
                    _map(of_kind, "entropy", entropies, "entropy over the highest possible"),
                    f"0: looks at one token; 1: looks everywhere alike. {framed}",
                    _each(entropies, "head", "entropy"),
                    f"Heat map, blocks by {kind}",
                )
            )
    return found


def training(found: dict[str, Any]) -> Picture:
    """Return the picture of how a training won back what had been lost."""
    looked = [moment for moment in found["history"] if moment["held_out"] is not None]
    points = [(float(moment["step"]), float(moment["held_out"])) for moment in looked]
    tips = [f"step {step:.0f}: {formatting.number(loss)}" for step, loss in points]
    base, post, final = (float(found[key]) for key in ("base", "post", "final"))
    won = found["recovery"]
    share = (
        "nothing had been lost" if won is None else f"{formatting.percent(won)} of it was won back"
    )
    return Picture(
        "Loss while it was trained",
        curves(
            [Curve("#0072b2", points, tips)],
            base,
            Axis("held-out loss", formatting.number, wide=True, steps=True, salt="training"),
        ),
        f"Of held-out text: {formatting.number(base)} dense (dashed), {formatting.number(post)} once units "
        f"were gone, {formatting.number(final)} after the training: {share}.",
        [{"step": moment["step"], "loss": moment["loss"], "held_out": moment["held_out"]}
         for moment in found["history"]],
        "Line over steps",
    )  # fmt: skip


def rows(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each unit: its place, its score, and whether it stayed."""
    return [
        {
            "layer": layer["name"],
            "kind": layer["kind"],
            "unit": unit,
            "score": score,
            "kept": unit in kept,
        }
        for layer in layers
        for kept in [set(layer["kept"])]
        for unit, score in enumerate(layer["scores"])
    ]


def _each(values: Mapping[str, Sequence[float]], unit: str, what: str) -> list[dict[str, Any]]:
    """Return a row for each value of each layer."""
    return [
        {"layer": name, unit: place, what: value}
        for name, found in values.items()
        for place, value in enumerate(found)
    ]


def _shares(values: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Return, for each value, the share of the other values of all layers that are lower."""
    every = sorted(value for found in values.values() for value in found)
    places = {value: place for place, value in reversed([*enumerate(every)])}
    most = max(len(every) - 1, 1)
    return {name: [places[value] / most for value in found] for name, found in values.items()}


def _map(
    layers: Sequence[dict[str, Any]], what: str, values: dict[str, list[float]], label: str
) -> str:
    from matplotlib.colors import Normalize

    cells = [
        Cell(
            row,
            place,
            value,
            f"{layer['name']}, {place}: {what} {formatting.number(value)}, {'kept' if kept else 'gone'}",
            None if kept else GONE,
        )
        for row, layer in enumerate(layers)
        for found in [values[layer["name"]]]
        for place, value in enumerate(found)
        # Under grouped queries several heads are one unit.
        for kept in [place * layer["units"] // len(found) in layer["kept"]]
    ]
    width = max(map(len, values.values()))
    grid = Grid(_rows(layers), [str(place) for place in range(width)], cells)
    return draw(grid, Scale(label, "viridis", Normalize(0, 1), _percent()), salt=layers[0]["kind"])


def _rows(layers: Sequence[dict[str, Any]]) -> list[str]:
    parts = [split(layer["name"]) for layer in layers]
    if not all(block for block, _ in parts):  # a list of blocks is in none
        return [layer["name"] for layer in layers]
    blocks, inside = [block for block, _ in parts], [rest for _, rest in parts]
    if len(set(blocks)) == len(blocks):
        return block_labels(blocks)
    names = dict(zip(dict.fromkeys(inside), linear_labels([*dict.fromkeys(inside)]), strict=True))
    labels = block_labels(blocks)
    return [f"{label} {names[rest]}" for label, rest in zip(labels, inside, strict=True)]


def _percent() -> "Formatter":
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, 0, " %")
