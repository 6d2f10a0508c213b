"""Heat maps of units by layer."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunekit import formatting
from prunekit.reports.figures.draw import Cell, Grid, Scale, draw
from prunekit.reports.figures.layers import block_labels, linear_labels, split
from prunekit.reports.figures.picture import Picture

if TYPE_CHECKING:
    from matplotlib.ticker import Formatter

LARGEST = 128
"""Maximum number of units of a layer that a heat map draws."""

REMOVED_COLOR = "#d62828"
"""Color of the frame of a removed unit."""

Layers = Sequence[dict[str, Any]]
"""Report entries of unit groups."""


def maps(layers: Layers, agreement: Mapping[str, float]) -> list[Picture]:
    """Return heat maps of scores, losses and attention entropies.

    A kind of units with more than ``LARGEST`` in a layer is left out.

    Args:
        layers: Entries of a report.
        agreement: Spearman's ρ of scores and leave-one-out, by kind, where it was measured.
    """
    pictures = []
    for kind in dict.fromkeys(layer["kind"] for layer in layers):
        of_kind = [layer for layer in layers if layer["kind"] == kind]
        if max(layer["units"] for layer in of_kind) > LARGEST:
            continue
        pictures.append(_score_map(kind, of_kind))
        if kind in agreement:
            pictures.append(_loss_map(kind, of_kind, agreement[kind]))
        if all(layer.get("entropy") for layer in of_kind):
            pictures.append(_entropy_map(kind, of_kind))
    return pictures


def _score_map(kind: str, layers: Layers) -> Picture:
    scores = _rank_fractions({layer["name"]: layer["scores"] for layer in layers})
    return Picture(
        f"{kind.capitalize()} by score",
        _map(layers, "score", scores, "share of scores that are lower"),
        f"Scores of the dense model. {_framed(kind, layers)}",
        rows(layers),
        f"Heat map, blocks by {kind}",
    )


def _loss_map(kind: str, layers: Layers, agreement: float) -> Picture:
    rises = {layer["name"]: layer["truth"] for layer in layers}
    return Picture(
        f"Loss without each of the {kind}",
        _map(layers, "rise of the loss", _rank_fractions(rises), "share of rises that are lower"),
        f"The true loss, which the score estimates: Spearman's ρ of both is "
        f"{formatting.number(agreement)}. {_framed(kind, layers)}",
        _unit_rows(rises, "unit", "rise"),
        f"Heat map, blocks by {kind}",
    )


def _entropy_map(kind: str, layers: Layers) -> Picture:
    entropies = {layer["name"]: layer["entropy"] for layer in layers}
    return Picture(
        "Attention entropy",
        _map(layers, "entropy", entropies, "entropy over the highest possible"),
        f"0: attends to one token; 1: attends to all tokens equally. {_framed(kind, layers)}",
        _unit_rows(entropies, "head", "entropy"),
        f"Heat map, blocks by {kind}",
    )


def _framed(kind: str, layers: Layers) -> str:
    removed = sum(layer["units"] - len(layer["kept"]) for layer in layers)
    return f"Framed: the {removed} removed {kind}."


def rows(layers: Layers) -> list[dict[str, Any]]:
    """Return a data row for each unit."""
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


def _unit_rows(
    values: Mapping[str, Sequence[float]], unit: str, quantity: str
) -> list[dict[str, Any]]:
    """Return a data row for each value of each layer."""
    return [
        {"layer": name, unit: place, quantity: value}
        for name, of_layer in values.items()
        for place, value in enumerate(of_layer)
    ]


def _rank_fractions(values: Mapping[str, Sequence[float | str]]) -> dict[str, list[float]]:
    """Replace each value by the fraction of all others that are lower."""
    values = {name: [float(value) for value in of_layer] for name, of_layer in values.items()}
    every = sorted(value for of_layer in values.values() for value in of_layer)
    places = {value: place for place, value in reversed([*enumerate(every)])}
    most = max(len(every) - 1, 1)
    return {name: [places[value] / most for value in of_layer] for name, of_layer in values.items()}


def _map(layers: Layers, quantity: str, values: dict[str, list[float]], label: str) -> str:
    """Return a heat map of units as SVG.

    Args:
        layers: Report entries of unit groups of one kind.
        quantity: Name of a value in the tooltips.
        values: Values between 0 and 1, by name of the layer.
        label: Label of the color scale.
    """
    from matplotlib.colors import Normalize

    cells = [
        Cell(
            row,
            place,
            value,
            f"{layer['name']}, {place}: {quantity} {formatting.number(value)}, "
            f"{'kept' if kept else 'removed'}",
            None if kept else REMOVED_COLOR,
        )
        for row, layer in enumerate(layers)
        for of_layer in [values[layer["name"]]]
        for place, value in enumerate(of_layer)
        # With grouped-query attention, one unit is several heads.
        for kept in [place * layer["units"] // len(of_layer) in layer["kept"]]
    ]
    width = max(map(len, values.values()))
    grid = Grid(_row_labels(layers), [str(place) for place in range(width)], cells)
    return draw(grid, Scale(label, "viridis", Normalize(0, 1), _percent()), salt=layers[0]["kind"])


def _row_labels(layers: Layers) -> list[str]:
    """Return layer labels: the block, and the path if needed."""
    parts = [split(layer["name"]) for layer in layers]
    if not all(block for block, _ in parts):  # a group of whole blocks is in no block
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
