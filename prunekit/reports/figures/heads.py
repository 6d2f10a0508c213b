"""Figures of single heads: attention maps, output norms and redundancy."""

from typing import Any

from prunekit import formatting
from prunekit.reports.figures.layers import block_labels, split
from prunekit.reports.figures.matrix import Matrix, picture
from prunekit.reports.figures.picture import Picture

MATRICES = 4
"""Number of layers whose redundancy is drawn; all are in report.json."""
LARGEST = 32
"""Maximum number of heads of a layer whose redundancy is drawn."""


def head_figures(report: dict[str, Any]) -> list[Picture]:
    """Return the figures of a report's views of heads, if any."""
    views = report.get("views")
    if not views:
        return []
    return [
        *(_attention(views["tokens"], head) for head in views["heads"]),
        _activity(views),
        *_redundancy(views["redundancy"]),
    ]


def _outcome(head: dict[str, Any]) -> str:
    return "kept" if head["kept"] else "removed"


def _name(head: dict[str, Any]) -> str:
    (block,) = block_labels([split(head["layer"])[0]])
    return f"block {block}, head {head['head']}"


def _attention(tokens: list[str], head: dict[str, Any]) -> Picture:
    names = [_word(token) for token in tokens]
    attention = [
        # Masked positions are left out rather than drawn as zero.
        [value if value or key <= query else None for key, value in enumerate(values)]
        for query, values in enumerate(head["attention"])
    ]
    return picture(
        f"Attention of {_name(head)}, {_outcome(head)}",
        Matrix("attention", attention, ("query", "key"), names, names, "from"),
        f"How much each token (row) attends to each other token. {head['layer']}; score "
        f"{formatting.number(head['score'])}.",
        f"{head['layer']} {head['head']}",
    )


def _activity(views: dict[str, Any]) -> Picture:
    labels = [f"{_name(head)}, {_outcome(head)}" for head in views["heads"]]
    norms = [head["activity"] for head in views["heads"]]
    words = [_word(token) for token in views["tokens"]]
    top = max(map(max, norms)) or 1.0
    return picture(
        "Output norms of heads",
        Matrix("norm", norms, ("head", "token"), labels, words, "head", (0.0, top), named=True),
        "Norm of what a head adds to the residual stream at each token, in the dense model.",
        "gates",
    )


def _redundancy(matrices: dict[str, list[list[float]]]) -> list[Picture]:
    """Return the matrices of the layers with the most similar heads."""
    small = {name: values for name, values in matrices.items() if 1 < len(values) <= LARGEST}
    most = sorted(small, key=lambda name: -_highest_similarity(small[name]))[:MATRICES]
    pictures = []
    for name in (name for name in small if name in most):
        values = small[name]
        heads = [str(head) for head in range(len(values))]
        (block,) = block_labels([split(name)[0]])
        pictures.append(
            picture(
                f"Redundancy between heads, block {block}",
                Matrix("alike", values, ("first", "second"), heads, heads, "head"),
                f"1: the outputs are the same up to a rotation (linear kernel alignment). {name}; "
                f"most alike: {formatting.number(_highest_similarity(values))}.",
                name,
            )
        )
    return pictures


def _highest_similarity(values: list[list[float]]) -> float:
    """Return the largest off-diagonal value."""
    return max(value for i, line in enumerate(values) for j, value in enumerate(line) if i != j)


def _word(token: str) -> str:
    """Return a token as a short label that is never empty."""
    shown = token.strip() or repr(token)[1:-1].replace(" ", "␣") or "·"
    return shown if len(shown) <= 10 else f"{shown[:9]}…"
