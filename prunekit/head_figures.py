"""Pictures of heads one by one: where they look, what passes their gates, who does the same."""

from typing import Any

from prunekit import units
from prunekit.figures import Cell, Grid, Scale, block_labels, draw, split
from prunekit.pictures import Picture

MATRICES = 4
"""Layers whose heads are compared in a picture; the others are in report.json."""
LARGEST = 32
"""Heads of a layer that can be compared in one."""


def views(report: dict[str, Any]) -> list[Picture]:
    """Return the pictures of a report that has them."""
    seen = report.get("views")
    if not seen:
        return []
    return [
        *(_attention(seen["tokens"], head) for head in seen["heads"]),
        _activity(seen),
        *_redundancy(seen["redundancy"]),
    ]


def _fate(head: dict[str, Any]) -> str:
    return "kept" if head["kept"] else "gone"


def _name(head: dict[str, Any]) -> str:
    (block,) = block_labels([split(head["layer"])[0]])
    return f"block {block}, head {head['head']}"


def _attention(tokens: list[str], head: dict[str, Any]) -> Picture:
    names = [_word(token) for token in tokens]
    rows = [
        {"query": query, "key": key, "attention": value}
        for query, values in enumerate(head["attention"])
        for key, value in enumerate(values)
    ]
    cells = [
        Cell(
            row["query"],
            row["key"],
            row["attention"],
            f"{names[row['query']]} → {names[row['key']]}: {units.number(row['attention'])}",
        )
        for row in rows
        if row["attention"] or row["key"] <= row["query"]
    ]
    grid = Grid(names, names, cells, "from", square=True)
    return Picture(
        f"Attention of {_name(head)}, {_fate(head)}",
        draw(grid, _scale("attention", 1.0), salt=f"{head['layer']} {head['head']}"),
        f"How much each token (row) looks at each other one. {head['layer']}; score "
        f"{units.number(head['score'])}.",
        rows,
        "Heat map, tokens by tokens",
    )


def _activity(seen: dict[str, Any]) -> Picture:
    names = [_word(token) for token in seen["tokens"]]
    labels = [f"{_name(head)}, {_fate(head)}" for head in seen["heads"]]
    rows = [
        {"layer": head["layer"], "head": head["head"], "token": place, "norm": value}
        for head in seen["heads"]
        for place, value in enumerate(head["activity"])
    ]
    cells = [
        Cell(row, place, value, f"{labels[row]} at {names[place]}: {units.number(value)}")
        for row, head in enumerate(seen["heads"])
        for place, value in enumerate(head["activity"])
    ]
    top = max((cell.value or 0.0 for cell in cells), default=1.0) or 1.0
    return Picture(
        "What passes the gates",
        draw(Grid(labels, names, cells, "head", square=True), _scale("norm", top), salt="gates"),
        "Norm of what a head adds to the residual stream at each token, before anything went.",
        rows,
        "Heat map, heads by tokens",
    )


def _redundancy(matrices: dict[str, list[list[float]]]) -> list[Picture]:
    """Return the matrices of the layers in which two heads are most alike."""
    small = {name: values for name, values in matrices.items() if 1 < len(values) <= LARGEST}
    most = sorted(small, key=lambda name: -_closest(small[name]))[:MATRICES]
    found = []
    for name in (name for name in small if name in most):
        values = small[name]
        heads = [str(head) for head in range(len(values))]
        rows = [
            {"first": first, "second": second, "alike": value}
            for first, line in enumerate(values)
            for second, value in enumerate(line)
        ]
        cells = [
            Cell(
                row["first"],
                row["second"],
                row["alike"],
                f"{row['first']} and {row['second']}: {units.number(row['alike'])}",
            )
            for row in rows
        ]
        svg = draw(Grid(heads, heads, cells, "head", square=True), _scale("alike", 1.0), salt=name)
        (block,) = block_labels([split(name)[0]])
        found.append(
            Picture(
                f"Redundancy between heads, block {block}",
                svg,
                f"1: what one gives, the other could give too (linear kernel alignment). {name}; "
                f"most alike: {units.number(_closest(values))}.",
                rows,
                "Heat map, heads by heads",
            )
        )
    return found


def _closest(values: list[list[float]]) -> float:
    return max(value for i, line in enumerate(values) for j, value in enumerate(line) if i != j)


def _scale(label: str, top: float) -> Scale:
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FuncFormatter

    return Scale(label, "viridis", Normalize(0, top), FuncFormatter(lambda x, _: f"{x:.2g}"))


def _word(token: str) -> str:
    """Return a token as a label: short, and never empty."""
    shown = token.strip() or repr(token)[1:-1].replace(" ", "␣") or "·"
    return shown if len(shown) <= 10 else f"{shown[:9]}…"
