"""A report as a paragraph and table rows for a paper."""

from typing import Any

from prunekit import formatting

# Keys of [prune] that are not settings of the method.
NOT_SETTINGS = {"method", "pattern", "sparsity", "allocation", "skip"}
NOT_SETTINGS |= {"on_indivisible", "measure_error", "truth"}  # these change no weight

MARKDOWN = str.maketrans({"\n": " "} | {letter: f"\\{letter}" for letter in "\\|*_`<"})
LATEX = str.maketrans(
    {"\n": " ", "∞": r"$\infty$", "→": r"$\to$", "—": "---"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {letter: f"\\{letter}" for letter in "&%$#_{}"}
)

APT_SETTINGS = ("rank", "scale", "warmup", "window", "windows", "decay", "ema", "growth")
"""Keys of [apt] that a paper states."""


def model_name(report: dict[str, Any]) -> str:
    """Return the last part of the model's path or Hub id."""
    path = str(report["model"].get("path") or "model")
    return path.rstrip("/").rpartition("/")[2] or path


def method_name(report: dict[str, Any]) -> str:
    """Return the name of the method in the config."""
    return str(_prune(report).get("method") or "unknown method")


def settings(report: dict[str, Any]) -> str:
    """Return the settings of the method as text: ``damping = 0.01, block = 128``."""
    prune = _prune(report)
    return ", ".join(f"{key} = {prune[key]}" for key in prune if key not in NOT_SETTINGS)


def paragraph(report: dict[str, Any]) -> str:
    """Return the run as sentences for a paper, without anything unmeasured."""
    sentences = (_pruning(report), _calibration(report), *_evaluations(report), _tools(report))
    return " ".join(sentence for sentence in sentences if sentence)


def markdown(report: dict[str, Any]) -> str:
    """Return a Markdown table with one row."""
    cells = [[text.translate(MARKDOWN) for text in cell] for cell in _cells(report)]
    heads, values = (" | ".join(part) for part in zip(*cells, strict=True))
    return f"| {heads} |\n|{' --- |' * len(cells)}\n| {values} |"


def latex(report: dict[str, Any]) -> str:
    """Return a commented header and a row of a LaTeX ``tabular``."""
    cells = [[text.translate(LATEX) for text in cell] for cell in _cells(report)]
    heads, values = (" & ".join(part) for part in zip(*cells, strict=True))
    return f"% {heads}\n{values} \\\\"


def _prune(report: dict[str, Any]) -> dict[str, Any]:
    config = report.get("config", {})
    if apt := config.get("apt"):
        return {"method": "APT"} | {key: apt[key] for key in APT_SETTINGS if key in apt}
    return config.get("prune") or {}


def _pruning(report: dict[str, Any]) -> str:
    model, sparsity, linears = report["model"], report["sparsity"], len(report["layers"])
    if "removed" in sparsity:
        return _removing(report)
    method_settings, allocation = settings(report), _prune(report).get("allocation")
    count, whole = model.get("parameters"), sparsity.get("whole_model")
    facts = [model.get("architecture"), count and f"{formatting.count(count)} parameters"]
    return (
        f"{model_name(report)}{_aside(', '.join(filter(None, facts)))} was pruned with "
        f"{method_name(report)}{_aside(method_settings)}, "
        f"pattern {sparsity.get('pattern', 'unstructured')}"
        f"{f', allocation {allocation}' if isinstance(allocation, str) else ''}: "
        f"{formatting.percent(sparsity['achieved'])} of the "
        f"{formatting.count(sparsity.get('of'))} weights "
        f"in {linears:,} linear layer{'s' * (linears != 1)} are zero"
        f"{'' if whole is None else _aside(f'{formatting.percent(whole)} of the whole model')}"
        f"{_trained(report, '; the others')}."
    )


def _removing(report: dict[str, Any]) -> str:
    model, sparsity = report["model"], report["sparsity"]
    before, after = sparsity["parameters"]
    removed = " and ".join(
        f"{part:,} of {whole:,} {kind}" for kind, (part, whole) in sparsity["removed"].items()
    )
    facts = f"{model.get('architecture')}, {formatting.count(before)} parameters"
    return (
        f"{removed} were removed from {model_name(report)} ({facts}), ranked by "
        f"{method_name(report)}{_aside(settings(report))}: "
        f"{formatting.count(after)} parameters are left, "
        f"{formatting.percent(sparsity['whole_model'])} fewer{_trained(report, ', and')}."
    )


def _trained(report: dict[str, Any], subject: str) -> str:
    """Return a clause on the training of the model, if any."""
    training = report.get("training")
    if not training:
        return ""
    if training["post"] is None:
        return f", pruned during a training of {training['steps']:,} steps"
    return f"{subject} were trained for {training['steps']:,} steps"


def _aside(text: str) -> str:
    return f" ({text})" if text else ""


def _calibration(report: dict[str, Any]) -> str:
    data = report.get("calibration")
    if not data:
        return ""
    return (
        f"Calibration used {formatting.count(data['samples'])} sequences of "
        f"{sequence_tokens(data)} tokens ({data['tokens']:,} tokens; "
        f"seed {data['seed']}): "
        f"{data['description'].rstrip('.')}."
    )


def sequence_tokens(calibration: dict[str, Any]) -> str:
    """Return the tokens of a calibration sequence, in words."""
    alike = calibration["tokens"] == calibration["samples"] * calibration["length"]
    return ("" if alike else "at most ") + formatting.count(calibration["length"])


def _evaluations(report: dict[str, Any]) -> list[str]:
    return [
        f"{evaluation['metric'][:1].upper()}{evaluation['metric'][1:]} on {evaluation['data']} was "
        f"{formatting.measured(metric, before := evaluation.get('before'))} before and "
        f"{formatting.measured(metric, after := evaluation.get('after'))} after pruning "
        f"({formatting.measured_change(metric, before, after)}; "
        f"{evaluation['protocol'].rstrip('.')})."
        for evaluation in report.get("evaluation") or []
        for metric in [evaluation["metric"]]
    ]


def _tools(report: dict[str, Any]) -> str:
    machine = report.get("environment") or {}
    tools = [f"prunekit {report['prunekit']}"]
    tools += [f"{tool} {machine[tool]}" for tool in ("torch", "transformers") if tool in machine]
    where = f" on {machine['device']}" if "device" in machine else ""
    total = (report.get("seconds") or {}).get("total")
    time = f" in {formatting.duration(total)}" if total else ""
    return f"Made with {', '.join(tools)}{where}{time}."


def _cells(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return header and value of each cell."""
    sparsity = report["sparsity"]
    cells = [
        ("Model", model_name(report)),
        ("Method", method_name(report)),
        ("Pattern", str(sparsity.get("pattern", "unstructured"))),
        ("Sparsity", formatting.percent(sparsity["achieved"])),
    ]
    for evaluation in report.get("evaluation") or []:
        metric = evaluation["metric"]
        values = [formatting.measured(metric, evaluation.get(key)) for key in ("before", "after")]
        cells.append((f"{metric}, {evaluation['data']}", " → ".join(values)))
    return cells
