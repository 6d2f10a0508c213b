"""Compare two checkouts: do they write the same bytes from one seed?

``python -m bench.jobs.same_bytes OTHER`` runs each case with this checkout and with the other, in
separate processes, and compares every file; reports, journals and plans without measured values. It
relies only on the command line, the keys of a config and the journal's ``kind``.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Side = tuple[Path, Path]  # a checkout, and the folder for its output
RUN = "run config.toml --quiet"
TEXT = "the quick brown fox jumps over the lazy dog. pack my box with five dozen jugs.\n" * 20
MEASURED = re.compile(r"\w*seconds|prefill|decode|(peak|sent)_\w+|environment|Tokens/s.*|Peak.*")
"""Keys of reports and journals that differ from run to run."""
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
         "num_attention_heads": 4}  # fmt: skip
LLAMA = {**SIZES, "model_type": "llama", "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama16": {**LLAMA, "dtype": "bfloat16"},
    "bert": {**SIZES, "model_type": "bert"},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "mixtral": {**LLAMA, "model_type": "mixtral", "num_local_experts": 4},
    "t5": {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
           "num_decoder_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
}  # fmt: skip
HEADS = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
"""Auto classes of models that are not causal language models: no perplexity."""


@dataclass(frozen=True)
class Case:
    """A job: a model and the config tables that override defaults."""

    model: str
    tables: Mapping[str, Mapping[str, Any]]
    commands: tuple[str, ...] = (RUN,)
    code: int = 0  # expected exit code of each command
    ranks: int = 1  # number of processes
    begun: str = ""  # a case that the other checkout began and this one resumes


def _case(model: str, method: str, pattern: Any, sparsity: Any = None, **keys: Any) -> Case:  # noqa: ANN401
    """Return a case; keywords are its fields, tables, or keys of [prune]."""
    fields = {name: keys.pop(name) for name in ("commands", "code", "ranks") if name in keys}
    tables = {name: keys.pop(name) for name in [*keys] if isinstance(keys[name], dict)}
    prune = {"method": method, "pattern": pattern, "sparsity": sparsity, **keys}
    return Case(model, {"prune": prune, **tables}, **fields)


ANY, BOTH = "unstructured", ["heads", "neurons"]
CASES: dict[str, Case] = {
    "magnitude-global": _case("llama", "magnitude", ANY, 0.6, scope="layer", allocation="global"),
    "magnitude-tiles": _case("bert", "magnitude", "block:4x4", 0.5, measure_error=False),
    "random-own-text": _case("gpt2", "random", ANY, 0.6, calibration={"data": "self"}),
    "wanda-stored": _case("llama16", "wanda", "2:4", output={"format": "2:4"}, commands=(
        RUN, "convert out dense --format dense", "convert dense packed --format 2:4",
        "convert packed masked --format bitmask")),
    "wanda-rows-apart": _case("gpt2", "wanda", "row", 0.25, propagation="none"),
    "wanda-experts": _case("mixtral", "wanda", "2:4", propagation="stage"),
    "ria-refined": _case("gpt2", "ria", "4:8", refine="pcg"),
    "ria-residual": _case("t5", "ria", "2:4", permute="residual", target="dense"),
    "sparsegpt-permuted": _case("llama", "sparsegpt", "2:4", propagation="stage", permute=True),
    "steps": _case("gpt2", "sparsegpt", ANY, 0.6, steps=3, initial_sparsity=0.2, allocation="owl"),
    "sparsegpt-adapter": _case("llama16", "sparsegpt", "column", 0.25, recover="lowrank"),
    "sparsegpt-on-disk": _case("gpt2", "sparsegpt", "4:8", calibration={"hidden": "disk"}),
    "sparsegpt-experts": _case("mixtral", "sparsegpt", ANY, 0.6),
    "alps-curves": _case("llama", "alps", ANY, 0.6, allocation="curves", target="dense"),
    "alps-bert": _case("bert", "alps", "2:4", propagation="block", skip=["*.0.*"]),
    "admm-tuned": _case("llama", "admm", "2:4", permute="residual", recover="block"),
    "admm-bitmask": _case("llama16", "admm", ANY, 0.6, output={"format": "bitmask"}),
    "admm-mixed": _case("gpt2", "admm", "4:8", allocation="curves", target="layer"),
    "units-hybrid": _case("llama", "hybrid", BOTH, 0.5, uniform=True),
    "units-trained": _case("llama", "obs", BOTH, parameters=0.7,
                           train={"steps": 4, "batch": 2, "held_out": 2, "every": 2}),
    "units-hidden": _case("llama", "gradient", "hidden", 0.25, steps=2),
    "units-blocks": _case("gpt2", "block-influence", "blocks", 0.34, truth=True),
    "units-bias": _case("gpt2", "flap", "neurons", 0.05, steps="each", scope="layer"),
    "sweep": _case("gpt2", "random", ANY, sweep={"tokens": 2, "sparsity": [0.25, 0.5]}),
    "refused": _case("llama", "wander", "2:4", 0.5, code=2),
    "refused-shape": _case("llama", "wanda", "block:5x5", 0.5, code=2),
    "planned": _case("llama", "sparsegpt", "2:4", commands=("plan config.toml",)),
    "ranks": _case("llama", "sparsegpt", "2:4", ranks=2),
    "ranks-apart": _case("gpt2", "wanda", "4:8", propagation="none", ranks=2),
    "ranks-units": _case("llama", "salience", "neurons", 0.25, ranks=2),
}  # fmt: skip
for _name in ("sparsegpt-permuted", "admm-tuned", "admm-bitmask", "units-trained", "ranks"):
    CASES[f"{_name}-resumed"] = replace(CASES[_name], commands=(f"{RUN} --resume",), begun=_name)


def main() -> int:
    """Run the chosen cases and return 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.jobs.same_bytes", description=__doc__)
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("--this", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--keep", type=Path, help="folder for the output of OTHER, reused")
    parser.add_argument("--only", default="", help="only cases whose names hold this")
    parser.add_argument("--messages", action="store_true", help="compare refusals word for word")
    given, began, place = parser.parse_args(), time.monotonic(), Path(tempfile.mkdtemp())
    this = given.this.absolute(), place / "this"
    other = given.other.absolute(), (given.keep or place / "other").absolute()
    _write_models(other[1] / "models")
    for checkout, _ in (this, other):
        _check(checkout)
    problems = [*_problems(given.only, this, other, messages=given.messages)]
    wrong = len([*filter(None, problems)])
    print(f"{wrong} of {len(problems)} cases differ; {time.monotonic() - began:.0f} s")
    if wrong:
        print(f"The output is kept in {place}.")
    else:
        shutil.rmtree(place)
    return int(wrong > 0)


def _problems(only: str, this: Side, other: Side, *, messages: bool) -> Iterator[str]:
    """Run cases, print a line each, and yield their differences."""

    def compare(name: str) -> tuple[int, str]:
        source, kept = CASES[name].begun or name, other[1]
        wrong = _carry_out(other, source, kept) or _carry_out(this, name, kept)
        folders, said = (this[1] / name, kept / source), messages and CASES[name].code != 0
        found, expected = (_facts(folder, said=said) for folder in folders)
        odd = " ".join(file for file in found if found[file] != expected.get(file))
        return len(found), wrong or _difference(found, expected) + (odd and f" [{odd}]")

    # Two processes at a time; cases that resume another one run after it.
    for turn in ((1, False), (1, True), (2, False), (2, True)):
        some = [name for name, case in CASES.items() if (case.ranks, bool(case.begun)) == turn]
        names = [name for name in some if only in name]
        with ThreadPoolExecutor(2 // turn[0]) as pool:
            for name, (files, problem) in zip(names, pool.map(compare, names), strict=True):
                print(f"{name:28} {files:3} files  {problem or 'same'}", flush=True)
                yield problem


def _carry_out(side: Side, name: str, kept: Path) -> str:
    """Run a case unless its folder is complete; return its failure."""
    case, folder = CASES[name], side[1] / name
    ended, config = folder / "ended.json", _config(case, kept / "models")
    wanted = json.dumps([config, case.commands, case.ranks])
    if ended.is_file() and ended.read_text() == wanted:
        return ""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "said").mkdir(parents=True)
    if case.begun:
        shutil.copytree(kept / case.begun / "out", folder / "out")
        _stop_midway(folder / "out")
    (folder / "config.toml").write_text(config)
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks), "-m"]
    for number, command in enumerate(case.commands):
        start = [*(launch if case.ranks > 1 else []), "prunekit"]
        done = _python(side[0], folder, "-m", *start, *command.split())
        (folder / "said" / f"{number}.out").write_text(done.stdout)
        (folder / "said" / f"{number}.err").write_text(done.stderr)
        if done.returncode != case.code:
            return f"FAILED in {folder}: exit code {done.returncode}, {done.stderr[-160:]!r}"
    ended.write_text(wanted)
    return ""


def _python(checkout: Path, folder: Path, *given: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a checkout's package, in one thread: equal sums."""
    path = os.pathsep.join([str(checkout), str(checkout / "kernels")])
    ours = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *given], cwd=folder, env=os.environ | ours | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def _check(checkout: Path) -> None:
    """Check that the checkout's package is imported, not an installed one."""
    code = "import prunekit as p, prunekit_kernels as k; print([*p.__path__, *k.__path__])"
    done = _python(checkout, Path(tempfile.gettempdir()), "-c", code)
    if done.stdout.strip() != str([f"{checkout}/prunekit", f"{checkout}/kernels/prunekit_kernels"]):
        sys.exit(f"{checkout}: imported instead: {done.stdout}{done.stderr}")


def _stop_midway(output: Path) -> None:
    """Reduce a finished run to one killed after its first block."""
    journal = output / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines]
    end = 1 + next(i for i, entry in enumerate(entries) if entry["kind"] in {"block", "shrunk"})
    journal.write_bytes(b"".join(lines[:end]) + lines[end][:20])
    lost = {entry["values"].get("file") for entry in entries[end:]}
    for file in output.iterdir():
        if file.name in lost or (file != journal and file.suffix != ".safetensors"):
            file.unlink()


def _config(case: Case, models: Path) -> str:
    data = {"data": str(models / case.model / "text.txt")}
    tables: dict[str, dict[str, Any]] = {
        "model": {"path": str(models / case.model), "device": "cpu"},
        "calibration": data | {"samples": 8, "length": 24},
        "output": {"path": "out"},
    }
    if case.model not in HEADS:
        tables["evaluate"] = data | {"length": 12, "windows": 3}
    text = ""
    for name in tables | case.tables:
        text += f"[{name}]\n"
        for key, value in (tables.get(name, {}) | case.tables.get(name, {})).items():
            # Strings, numbers, booleans and lists of TOML are those of JSON.
            text += "" if value is None else f"{key} = {json.dumps(value)}\n"
    return text


def _write_models(folder: Path) -> None:
    """Write tiny random models with tokenizers of one token per character."""
    sizes = folder / "sizes.json"
    if sizes.is_file():
        if json.loads(sizes.read_text()) != MODELS:
            sys.exit(f"{folder}: holds models of another version of this; name another folder.")
        return
    import torch
    import transformers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    words = [*special.values(), *string.ascii_letters, *string.digits, *" .,\n"]
    made = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, special["unk_token"])
    )
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    ids = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name, given in MODELS.items():
        config = transformers.AutoConfig.for_model(**(ids | given))
        torch.manual_seed(0)
        model = getattr(transformers, HEADS.get(name, "AutoModelForCausalLM")).from_config(
            config, trust_remote_code=False
        )
        model.to(getattr(torch, given.get("dtype", "float32"))).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        (folder / name / "text.txt").write_text(TEXT)
    sizes.write_text(json.dumps(MODELS))


def _facts(folder: Path, *, said: bool) -> dict[str, Any]:
    """Return the facts to compare by file; with standard error if ``said``."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.parent != folder)
    kept = (file for file in files if said or file.suffix != ".err")
    return {str(file.relative_to(folder)): _fact(file, folder) for file in kept}


def _fact(file: Path, folder: Path) -> object:
    if file.suffix == ".html":
        return "there"  # its contents are in report.json
    if file.suffix == ".safetensors":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    text = file.read_text().replace(str(folder), "FOLDER")
    if file.name in {"report.json", "journal.jsonl"}:
        lines = text.splitlines() if file.suffix == ".jsonl" else [text]
        return [_lasting(json.loads(line)) for line in lines]
    if file.name == "report.csv":
        return [_lasting(row) for row in csv.DictReader(text.splitlines())]
    # A plan wraps its lines at paths, and its frames are as long as the lines.
    return re.sub(r"[\s─━]+|time: .*", " ", text) if file.parent.name == "said" else text


def _lasting(value: Any) -> Any:  # noqa: ANN401
    """Return a report without measured values."""
    if isinstance(value, dict):
        return {key: _lasting(entry) for key, entry in value.items() if not MEASURED.fullmatch(key)}
    return [_lasting(entry) for entry in value] if isinstance(value, list) else value


def _difference(one: Any, other: Any, where: str = "") -> str:  # noqa: ANN401
    """Return where two facts first differ; empty if they do not."""
    if one == other:
        return ""
    if isinstance(one, list) and isinstance(other, list):
        one, other = (dict(enumerate(value)) for value in (one, other))
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return f"DIFFERENT{where}: {str(one)[:40]} instead of {str(other)[:40]}"
    if odd := one.keys() ^ other.keys():
        return f"DIFFERENT{where}: only on one side: {', '.join(sorted(map(str, odd)))}"
    return next(filter(None, (_difference(one[k], other[k], f"{where} {k}") for k in one)), "")


if __name__ == "__main__":
    sys.exit(main())
