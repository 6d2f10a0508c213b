"""The recorded outcome of every model type, and the page made of it.

``python -m tests.support.families`` tries every model type of the installed transformers and writes
``tests/families.json`` and ``bench/results/families.md``; with names, as ``causal:llama``, only
these are tried anew; with ``--page`` none is.
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import transformers

from tests.support.family_configs import TASKS, cases
from tests.support.family_trial import trial

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests/families.json"
PAGE = ROOT / "bench/results/families.md"
KINDS = ("weights", "expert weights", "experts", "heads", "neurons", "hidden", "blocks")
TITLES = {
    "causal": "Causal language models",
    "vlm": "Images and text",
    "seq2seq": "Sequence to sequence",
    "masked": "Masked language models",
}


def recorded() -> dict[str, Any]:
    """Return version of transformers and outcomes, as recorded."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def page(table: dict[str, Any]) -> str:
    """Return the page about all model types, in Markdown."""
    outcomes = table["outcomes"]
    count = Counter(outcome["result"] for outcome in outcomes.values())
    lines = [
        "# Model families",
        "",
        f"Every model type of transformers {table['transformers']} for language, alone or with "
        "images, tried on a tiny random checkpoint: pruned with Wanda, every mask computed a "
        "second time from the dense model, opened by stock transformers, compared with the "
        f"recorded outputs. {count['works']} work, {count['refused']} are refused with the reason, "
        f"of {count['not built']} no tiny model was built, which says nothing about them. Written "
        "by `python -m tests.support.families`.",
        "",
    ]
    for task in TASKS:
        rows = {
            case.partition(":")[2]: outcome
            for case, outcome in sorted(outcomes.items())
            if case.startswith(f"{task}:")
        }
        lines += [f"## {TITLES[task]}", "", f"| model type | {' | '.join(KINDS)} |"]
        lines += ["|---" * (1 + len(KINDS)) + "|"]
        lines += [_row(name, each) for name, each in rows.items() if each["result"] == "works"]
        for result in ("refused", "not built"):
            found = {name: each for name, each in rows.items() if each["result"] == result}
            lines += ["", f"{result.capitalize()}:", ""] if found else []
            lines += [f"- {name}: {_cell(each['reason'])}" for name, each in found.items()]
        lines.append("")
    return "\n".join(lines)


def _row(name: str, outcome: dict[str, Any]) -> str:
    units = outcome.get("units", [])
    has = {"weights": True, "expert weights": bool(outcome.get("experts"))}
    marks = ("yes" if has.get(kind, kind in units) else "" for kind in KINDS)
    return f"| {name} | {' | '.join(marks)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Try model types and write table and page."""
    table = recorded() if TABLE.exists() else {"outcomes": {}}
    table["transformers"] = transformers.__version__
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    every = [*cases()]
    chosen = [each for each in arguments if not each.startswith("-")] or every
    for case in [] if "--page" in arguments else chosen:
        with tempfile.TemporaryDirectory() as folder:
            outcome = trial(case, Path(folder))
        table["outcomes"][case] = outcome.dump()
        sys.stdout.write(f"{case} {outcome.result} {outcome.reason[:120]}\n")
        _write(table, every)
    _write(table, every)
    return 0


def _write(table: dict[str, Any], every: list[str]) -> None:
    outcomes = {case: table["outcomes"][case] for case in every if case in table["outcomes"]}
    table["outcomes"] = outcomes
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(table), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
