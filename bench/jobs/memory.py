"""Peak memory of pruning large Llama-shaped checkpoints, beside its parts.

    python -m bench.jobs.memory [tinyllama-1.1b | llama-7b | llama-45m] [FOLDER] [--limit GIB]

The checkpoint (random parameters, bfloat16, 2.2 or 13.5 GB) is made in FOLDER once, block by block,
and pruned, each time in its own process: TinyLlama's shape by Wanda and by SparseGPT on 4 x 128
tokens, that of Llama-2-7B by Wanda on 8 x 256. With ``--limit`` only Wanda runs, with hidden states
on disk, in a control group (version 1, which must be writable) that is allowed no more memory than
that, including the system's cache of its files.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from bench.harness.measure import RESULTS, describe
from bench.jobs.end_to_end import timed

VOCABULARY = 32000


@dataclass(frozen=True)
class Shape:
    """A Llama's shape, and its methods, samples, and tokens per sample."""

    hidden: int
    feed_forward: int
    blocks: int
    heads: int
    kv_heads: int
    methods: tuple[str, ...]
    calibration: tuple[int, int]

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each linear of a block."""
        hidden, keys = self.hidden, self.hidden * self.kv_heads // self.heads
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (self.feed_forward, hidden),
            "mlp.up_proj": (self.feed_forward, hidden),
            "mlp.down_proj": (hidden, self.feed_forward),
        }


SHAPES = {
    "tinyllama-1.1b": Shape(2048, 5632, 22, 32, 4, ("wanda", "sparsegpt"), (4, 128)),
    "llama-7b": Shape(4096, 11008, 32, 32, 32, ("wanda",), (8, 256)),
    # Of 90 MB, to try a measurement.
    "llama-45m": Shape(512, 1376, 4, 8, 4, ("wanda",), (4, 128)),
}


def make(folder: Path, shape: Shape) -> None:
    """Write the checkpoint, with a tokenizer of 32000 words."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=VOCABULARY,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    generator = torch.Generator().manual_seed(0)
    parts = [
        {"model.embed_tokens": (VOCABULARY, shape.hidden), "lm_head": (VOCABULARY, shape.hidden)}
    ]
    norms = [["model.norm"]]
    for index in range(shape.blocks):
        prefix = f"model.layers.{index}."
        parts.append({prefix + name: size for name, size in shape.linears.items()})
        norms.append([prefix + "input_layernorm", prefix + "post_attention_layernorm"])
    weight_map = {}
    for number, (matrices, vectors) in enumerate(zip(parts, norms, strict=True)):
        shard = f"model-{number:05d}.safetensors"
        tensors = {
            f"{name}.weight": (torch.randn(size, generator=generator) * 0.02).bfloat16()
            for name, size in matrices.items()
        }
        tensors |= {
            f"{name}.weight": torch.ones(shape.hidden, dtype=torch.bfloat16) for name in vectors
        }
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config.save_pretrained(folder)


def write_text(folder: Path) -> None:
    """Write a calibration text of random words beside the checkpoint."""
    numbers = torch.randint(VOCABULARY, (40000,), generator=torch.Generator().manual_seed(1))
    (folder / "text.txt").write_text(" ".join(f"w{number}" for number in numbers.tolist()))


def main() -> None:
    """Measure and rewrite ``bench/results/<machine>/memory-<shape>.json``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", nargs="?", choices=SHAPES, default=next(iter(SHAPES)))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--limit", type=float, metavar="GIB")
    given = parser.parse_args()
    kind, shape = given.shape, SHAPES[given.shape]
    with tempfile.TemporaryDirectory() as name:
        folder = given.folder or Path(name, "model")
        if not (folder / "config.json").is_file():
            make(folder, shape)
        write_text(folder)
        if given.limit:
            _write(f"memory-{kind}-limited", kind, _limited(folder, shape, given.limit, Path(name)))
            return
        rows = [_measure(folder, shape, method, Path(name)) for method in shape.methods]
        imports = timed([sys.executable, "-c", _IMPORTS], Path(name) / "log")["peak_rss_bytes"]
    block = 2 * sum(rows * columns for rows, columns in shape.linears.values())
    samples, length = shape.calibration
    parts = {
        "imports": imports,
        "largest_block_stored": block,
        "largest_block_float32": 2 * block,
        "gram_matrices": 4 * (3 * shape.hidden**2 + shape.feed_forward**2),
        "hidden_states": 4 * samples * length * shape.hidden,
    }
    _write(f"memory-{kind}", kind, {"parts_bytes": parts, "rows": rows})


def _write(name: str, kind: str, facts: dict[str, object]) -> None:
    machine = describe(torch.device("cpu"))
    found = {"machine": machine, "shape": kind, **facts}
    target = RESULTS / machine["name"] / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


_IMPORTS = "import prunekit.runs.sparsify.run, prunekit.runs.sparsify.planner"


def _limited(model: Path, shape: Shape, limit: float, folder: Path) -> dict[str, object]:
    """Prune within a memory limit that includes cached checkpoint pages."""
    allowed = int(limit * 2**30)
    # Pages that are already cached are charged to the group that read them first.
    for file in model.glob("*.safetensors"):
        with file.open("rb") as content:
            os.fsync(content.fileno())
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with control_group(allowed) as group:
        row = _measure(model, shape, "wanda", folder, within=group)
        peak = int((group / "memory.max_usage_in_bytes").read_text())
    return {
        "limit_bytes": allowed,
        "checkpoint_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "peak_group_bytes": peak,
        "rows": [row],
    }


@contextmanager
def control_group(nbytes: int) -> Iterator[Path]:
    """Create a memory-limited control group; remove it at the end."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = next((path for _, kinds, path in lines if "memory" in kinds.split(",")), None)
    if own is None:
        sys.exit("--limit needs the memory controller of control groups, version 1.")
    group = Path(f"/sys/fs/cgroup/memory{own}", "prunekit-bench")
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(nbytes))
        yield group
    finally:
        group.rmdir()


def _into(group: Path) -> list[str]:
    """Return the command prefix that moves a process into a control group."""
    return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group)]


def _measure(
    model: Path, shape: Shape, method: str, folder: Path, within: Path | None = None
) -> dict[str, object]:
    config = folder / f"{method}.toml"
    samples, length = shape.calibration
    config.write_text(f"""
[model]
path = "{model.absolute()}"
device = "cpu"
[calibration]
data = "{(model / "text.txt").absolute()}"
samples = {samples}
length = {length}
{'hidden = "disk"' if within else ""}
[prune]
method = "{method}"
pattern = "2:4"
measure_error = {"true" if method == "sparsegpt" else "false"}
[output]
path = "{folder / method}"
""")
    command = [sys.executable, "-m", "prunekit", "run", str(config), "--quiet"]
    command = [*_into(within), *command] if within else command
    row = {"method": method, **timed(command, folder / f"{method}.log")}
    report = json.loads((folder / method / "report.json").read_text())
    planned = {key: value for key, value in report["memory"].items() if key.endswith("_bytes")}
    journal = (folder / method / "journal.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, journal) if entry["kind"] == "block"]
    blocks = statistics.median(entry["values"]["seconds"] for entry in entries)
    return {
        **row,
        "seconds_a_block": blocks,
        "phases": report["seconds"],
        "report": planned,
        "achieved": report["sparsity"]["achieved"],
    }


if __name__ == "__main__":
    main()
