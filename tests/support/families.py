"""The recorded outcome of every model type, and the page made of it.

``python -m tests.support.families`` tries every model type of the installed transformers and writes
``tests/families.json``, ``bench/results/families.md`` and a table of the README; with names, as
``causal:llama``, only these are tried anew; with ``--page`` none is.
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
README = ROOT / "README.md"
MARKS = "<!-- families -->", "<!-- end of families -->"
"""What encloses the table of the README."""
MOST_USED = {
    "Llama, Mistral, Ministral 3": ("causal:llama", "causal:mistral", "causal:ministral3"),
    "Qwen 2, 3; Gemma 2, 3 (text)": (
        "causal:qwen2",
        "causal:qwen3",
        "causal:gemma2",
        "causal:gemma3_text",
    ),
    "Phi 3, GLM 4, OLMo 3, SmolLM 3": (
        "causal:phi3",
        "causal:glm4",
        "causal:olmo3",
        "causal:smollm3",
    ),
    "GPT-2, GPT-NeoX, OPT": ("causal:gpt2", "causal:gpt_neox", "causal:opt"),
    "Mixtral, Qwen 3 MoE": ("causal:mixtral", "causal:qwen3_moe"),
    "DeepSeek V3, GLM 4 MoE, GPT-OSS, MiniMax M2": (
        "causal:deepseek_v3",
        "causal:glm4_moe",
        "causal:gpt_oss",
        "causal:minimax_m2",
    ),
    "Qwen 3 Next, Nemotron-H, Granite 4 hybrid, LFM 2 MoE": (
        "causal:qwen3_next",
        "causal:nemotron_h",
        "causal:granitemoehybrid",
        "causal:lfm2_moe",
    ),
    "Qwen 2.5 VL, Qwen 3 VL, Gemma 3, LLaVA, InternVL, SmolVLM, PaliGemma": (
        "vlm:qwen2_5_vl",
        "vlm:qwen3_vl",
        "vlm:gemma3",
        "vlm:llava",
        "vlm:internvl",
        "vlm:smolvlm",
        "vlm:paligemma",
    ),
    "Mamba, Mamba 2, Falcon-H1": ("causal:mamba", "causal:mamba2", "causal:falcon_h1"),
    "BERT, RoBERTa, DistilBERT": ("masked:bert", "masked:roberta", "masked:distilbert"),
    "ModernBERT, DeBERTa V2, ELECTRA": ("masked:modernbert", "masked:deberta-v2", "masked:electra"),
    "T5, mT5, BART, T5Gemma": ("seq2seq:t5", "seq2seq:mt5", "seq2seq:bart", "seq2seq:t5gemma"),
}
"""Families of the README and the cases that stand for them."""
KINDS = ("weights", "expert weights", "experts", "heads", "neurons", "hidden", "blocks")
TITLES = {
    "causal": "Causal language models",
    "vlm": "Images and text",
    "seq2seq": "Sequence to sequence",
    "masked": "Masked language models",
    "speech": "Speech to text",
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


def summary(table: dict[str, Any]) -> str:
    """Return the table of the README: what works in every case of a family, or in some."""
    lines = [f"| family | {' | '.join(KINDS)} |", "|---" * (1 + len(KINDS)) + "|"]
    for family, names in MOST_USED.items():
        found = [table["outcomes"].get(name, {"result": "not built"}) for name in names]
        works = [_kinds(each) for each in found]
        marks = []
        for kind in KINDS:
            count = sum(kind in kinds for kinds in works)
            marks.append("yes" if count == len(works) else "some" if count else "")
        lines.append(f"| {family} | {' | '.join(marks)} |")
    return "\n".join(lines)


def with_summary(text: str, table: dict[str, Any]) -> str:
    """Return the text of the README with this table between its marks."""
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n{summary(table)}\n{MARKS[1]}{after}"


def _kinds(outcome: dict[str, Any]) -> set[str]:
    if outcome["result"] != "works":
        return set()
    experts = {"expert weights"} if outcome.get("experts") else set()
    return {"weights", *experts, *outcome.get("units", [])}


def _row(name: str, outcome: dict[str, Any]) -> str:
    marks = ("yes" if kind in _kinds(outcome) else "" for kind in KINDS)
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
    README.write_text(with_summary(README.read_text("utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
