"""Pictures of heads one by one: where they look, what passes their gates, who does the same."""

from typing import Any

from prunekit import formatting
from prunekit.reports.figures.layers import block_labels, split
from prunekit.reports.figures.matrix import Matrix, picture
from prunekit.reports.figures.picture import Picture

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
    looks = [
        # What a mask hides is no attention of 0.
        [value if value or key <= query else None for key, value in enumerate(values)]
        for query, values in enumerate(head["attention"])
    ]
    return picture(
        f"Attention of {_name(head)}, {_fate(head)}",
        Matrix("attention", looks, ("query", "key"), names, names, "from"),
        f"How much each token (row) looks at each other one. {head['layer']}; score "
        f"{formatting.number(head['score'])}.",
        f"{head['layer']} {head['head']}",
    )


def _activity(seen: dict[str, Any]) -> Picture:
    labels = [f"{_name(head)}, {_fate(head)}" for head in seen["heads"]]
    norms = [head["activity"] for head in seen["heads"]]
    words = [_word(token) for token in seen["tokens"]]
    top = max(map(max, norms)) or 1.0
    return picture(
        "What passes the gates",
        Matrix("norm", norms, ("head", "token"), labels, words, "head", (0.0, top), named=True),
        "Norm of what a head adds to the residual stream at each token, before anything went.",
        "gates",
    )


def _redundancy(matrices: dict[str, list[list[float]]]) -> list[Picture]:
    """Return the matrices of the layers in which two heads are most alike."""
    small = {name: values for name, values in matrices.items() if 1 < len(values) <= LARGEST}
    most = sorted(small, key=lambda name: -_closest(small[name]))[:MATRICES]
    found = []
    for name in (name for name in small if name in most):
        values = small[name]
        heads = [str(head) for head in range(len(values))]
        (block,) = block_labels([split(name)[0]])
        found.append(
            picture(
                f"Redundancy between heads, block {block}",
                Matrix("alike", values, ("first", "second"), heads, heads, "head"),
                f"1: what one gives, the other could give too (linear kernel alignment). {name}; "
                f"most alike: {formatting.number(_closest(values))}.",
                name,
            )
        )
    return found


def _closest(values: list[list[float]]) -> float:
    return max(value for i, line in enumerate(values) for j, value in enumerate(line) if i != j)


def _word(token: str) -> str:
    """Return a token as a label: short, and never empty."""
    shown = token.strip() or repr(token)[1:-1].replace(" ", "␣") or "·"
    return shown if len(shown) <= 10 else f"{shown[:9]}…"
