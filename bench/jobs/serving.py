"""Pruned models in vLLM: memory, speed and tokens by storage format.

    python -m bench.jobs.serving [--models NAME …]

Each model is pruned to 2:4 by magnitude, which is quick, and written in every format. Each folder
is then served by vLLM in a process of its own (environment: ``python3 tests/run.py serve``), and
its greedy tokens are compared with those of transformers and prunekit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.harness import vllm_environment
from bench.harness.measure import RESULTS, describe
from bench.jobs.end_to_end import CACHE, SHARED
from bench.jobs.formats import CONFIG
from prunekit.cli.demo import smollm2
from prunekit.config.load import load_config
from prunekit.inference.convert import convert
from prunekit.runs.sparsify.planner import plan
from prunekit.runs.sparsify.run import run

NEW, BATCH = 32, 4
PROMPTS = [[1, 9038, 2501, 263, 931, 727 + number] for number in range(BATCH)]
CASES = ("dense", "2:4", "2:4 expanded", "bitmask")

SERVE = """
import json, os, sys, time
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import psutil
from vllm import LLM, SamplingParams
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

process, memory, load = psutil.Process(), {}, CPUModelRunner.load_model
held = lambda: process.memory_full_info().uss
peak = lambda: next(
    1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")
)

def watched(runner, *arguments, **options):
    open("/proc/self/clear_refs", "w").write("5")
    before, resident = held(), process.memory_info().rss
    load(runner, *arguments, **options)
    memory.update(held=held() - before, peak=peak() - resident)

CPUModelRunner.load_model = watched
folder, dtype, prompts, new = json.loads(sys.argv[1])
model = LLM(model=folder, dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=4,
            distributed_executor_backend="uni", enable_prefix_caching=False)
wanted = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)

def generate(count):
    given = [{"prompt_token_ids": ids} for ids in prompts[:count]]
    began = time.perf_counter()
    done = model.generate(given, wanted, use_tqdm=False)
    return time.perf_counter() - began, [[*each.outputs[0].token_ids] for each in done]

generate(1)
alone, _ = generate(1)
together, tokens = generate(len(prompts))
speed = {"alone": new / alone, "together": new * len(prompts) / together}
import vllm
print("FOUND", json.dumps({"memory": memory, "speed": speed, "tokens": tokens,
                           "vllm": vllm.__version__}), flush=True)
"""


def served(folder: Path, dtype: str, *, expand: bool) -> dict[str, Any]:
    """Return what vLLM makes of a folder, in a process of its own."""
    interpreter = vllm_environment.find() or vllm_environment.make()
    given = json.dumps([str(folder), dtype, PROMPTS, NEW])
    root = vllm_environment.ROOT
    done = subprocess.run(
        [str(interpreter), "-W", "ignore", "-c", SERVE, given],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        env=os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1", "PRUNEKIT_EXPAND": str(int(expand)),
            "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
        },
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    if not lines:
        sys.exit(f"{folder}: vLLM failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(lines[0].removeprefix("FOUND"))


@cache
def expected(folder: Path, dtype: str) -> list[list[int]]:
    """Return the greedy tokens of transformers with prunekit."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=False
    )
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = [model.generate(torch.tensor([ids]), **options)[0] for ids in PROMPTS]
    return [each[len(PROMPTS[0]) :].tolist() for each in found]


def measure(name: str, model: Path, dtype: str) -> list[dict[str, Any]]:
    """Return a row for each format of one model."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "job.toml").write_text(CONFIG.format(model=model, out=folder / "dense"))
        for _ in run(plan(load_config(folder / "job.toml"))):  # pyright: ignore  a single run
            pass
        rows = []
        for case in CASES:
            kind = case.split()[0]
            if not (folder / kind).exists():
                convert(folder / "dense", folder / kind, kind)
            found = served(folder / kind, dtype, expand="expanded" in case)
            files = sum(file.stat().st_size for file in (folder / kind).glob("*.safetensors"))
            same = agreement(found.pop("tokens"), expected(folder / kind, dtype))
            rows.append({"model": name, "dtype": dtype, "format": case, "files": files, **found})
            rows[-1] |= {"same": same, "load": os.getloadavg()[1]}
            print(_line(rows[-1]), flush=True)
        return rows


def agreement(found: list[list[int]], wanted: list[list[int]]) -> int:
    """Return how many tokens agree before the first difference, over all prompts."""
    total = 0
    for mine, theirs in zip(found, wanted, strict=True):
        pairs = zip(mine, theirs, strict=True)
        total += next((at for at, (a, b) in enumerate(pairs) if a != b), len(theirs))
    return total


COLUMNS = (
    "model", "dtype", "format", "files", "memory added by loading", "peak while loading",
    "tokens/s, 1 request", f"tokens/s, {BATCH} requests", "tokens as transformers",
    "load",
)  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    memory, speed = row["memory"], row["speed"]
    cells = (
        row["model"], row["dtype"], row["format"], f"{row['files'] / 1e6:.1f} MB",
        f"{memory['held'] / 1e6:.0f} MB", f"{memory['peak'] / 1e6:.0f} MB",
        f"{speed['alone']:.1f}", f"{speed['together']:.1f}", f"{row['same']} of {NEW * BATCH}",
        f"{row['load']:.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


PAGE = """\
# Pruned models served by vLLM

vLLM {vllm} for CPUs on {machine}; 2:4 by magnitude, greedy, {new} new tokens, no torch.compile.
Written by `python -m bench.jobs.serving`. A CPU was used: the speeds say what compressed weights
cost there, and nothing about a GPU. Load is the average number of processes that wanted a core:
above the number of cores, speeds are too low, and rows compare only where it is alike. Memory is
the process's own (USS) after loading the model less that before, with the modules that loading
imports; the peak counts mapped files too. Tokens are counted up to the first difference in each
request; in bfloat16 vLLM and transformers round attention differently, for dense weights too.

{table}
"""


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page of results."""
    machine = describe(torch.device("cpu"))["name"]
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    table = "\n".join([*head, *map(_line, rows)])
    return PAGE.format(vllm=rows[0]["vllm"], machine=machine, new=NEW, table=table)


def main() -> None:
    """Measure and rewrite ``bench/results/serving.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", help="only these")
    options = parser.parse_args()
    models: dict[str, tuple[Callable[[], Path], str]] = {
        "SmolLM2-135M": (lambda: smollm2(CACHE / "smollm2-135m-instruct"), "bfloat16")
    }
    if SHARED.is_dir():
        models["stories15M"] = (lambda: SHARED / "models/stories15M", "float32")
    else:
        print(f"{SHARED} is absent: stories15M is left out.")
    rows: list[dict[str, Any]] = []
    for name, (model, dtype) in models.items():
        if not options.models or name in options.models:
            rows += measure(name, model(), dtype)
            (RESULTS / "serving.md").write_text(page(rows))


if __name__ == "__main__":
    main()
