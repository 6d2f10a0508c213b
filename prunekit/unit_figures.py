"""Heat maps of units: a row for each layer, a square for each unit, those that went in red."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prunekit import units
from prunekit.figures import Cell, Grid, Scale, block_labels, draw, linear_labels, split

if TYPE_CHECKING:
    from matplotlib.ticker import Formatter

LARGEST = 128
"""Units of a layer that can be told apart in a picture."""

GONE = "#d62828"


def maps(layers: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return title, SVG and caption of each heat map that there is something to show in."""
    found = []
    for kind in dict.fromkeys(layer["kind"] for layer in layers):
        of_kind = [layer for layer in layers if layer["kind"] == kind]
        if max(layer["units"] for layer in of_kind) > LARGEST:
            continue
        gone = sum(layer["units"] - len(layer["kept"]) for layer in of_kind)
        framed = f"Framed: the {gone} {kind} that went."
        found.append(
            (
                f"{kind.capitalize()} by score",
                _map(of_kind, "score", _places(of_kind), "share of scores that are lower"),
                f"What the ranker made of the model before anything went. {framed}",
            )
        )
        if all(layer.get("entropy") for layer in of_kind):
            entropies = {layer["name"]: layer["entropy"] for layer in of_kind}
            found.append(
                (
                    "Attention entropy",
                    _map(of_kind, "entropy", entropies, "entropy over the highest possible"),
                    f"0: looks at one token; 1: looks everywhere alike. {framed}",
                )
            )
    return found


def _places(layers: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return, for each score, the share of the other scores that are lower."""
    every = sorted(score for layer in layers for score in layer["scores"])
    places = {score: place for place, score in reversed([*enumerate(every)])}
    most = max(len(every) - 1, 1)
    return {layer["name"]: [places[score] / most for score in layer["scores"]] for layer in layers}


def _map(
    layers: Sequence[dict[str, Any]], what: str, values: dict[str, list[float]], label: str
) -> str:
    from matplotlib.colors import Normalize

    cells = [
        Cell(
            row,
            unit,
            value,
            f"{layer['name']}, {unit}: {what} {units.number(value)}, {_fate(layer, unit)}",
            None if unit in layer["kept"] else GONE,
        )
        for row, layer in enumerate(layers)
        for unit, value in enumerate(values[layer["name"]])
    ]
    width = max(layer["units"] for layer in layers)
    grid = Grid(_rows(layers), [str(unit) for unit in range(width)], cells)
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


def _fate(layer: dict[str, Any], unit: int) -> str:
    return "kept" if unit in layer["kept"] else "gone"


def _percent() -> "Formatter":
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, 0, " %")
