"""Table of a machine's kernel results, ours beside each contestant."""

import textwrap
from itertools import groupby
from pathlib import Path

from bench.ops import roofline

HALF = 0.5  # share of the floor below which a kernel has to say why


def write(folder: Path) -> Path:
    """Write ``kernels.md`` from the JSON files of a machine, and return it."""
    slow: dict[str, str] = {}
    lines = [
        "| op | case | ours | of the floor | beside it, and how many times ours |",
        "|---|---|---|---|---|",
    ]
    for op, result in roofline.results(folder).items():
        for case, rows in groupby(result["rows"], lambda row: f"{row['case']} {row['dtype']}"):
            ours, *others = rows
            time = ours["milliseconds"]["median"]
            beside = [
                f"{other['contestant']} {other['milliseconds']['median']:.3g} ms"
                f" ({other['milliseconds']['median'] / time:.2g}×)"
                for other in others
            ]
            share = f"{ours['share_of_floor']:.0%}"
            lines.append(f"| {op} | {case} | {time:.3g} ms | {share} | {', '.join(beside)} |")
            if ours["share_of_floor"] < HALF:
                slow[op] = result.get("why") or "not analysed yet."
    if slow:
        lines += ["", "## Why some stay below half of their floor", ""]
    for op, why in slow.items():
        text = f"- `{op}`: {' '.join(why.split())}"
        lines += textwrap.wrap(text, 100, subsequent_indent="  ", break_on_hyphens=False)
    file = folder / "kernels.md"
    file.write_text("\n".join(lines) + "\n")
    return file
