"""Peak memory of pruning a Llama-shaped checkpoint of 1.1B random parameters, beside its parts.

    python -m bench.memory [FOLDER]

The checkpoint (2.2 GB, bfloat16, the shape of TinyLlama-1.1B) is made in FOLDER once, block by
block, and pruned by Wanda and by SparseGPT on 4 x 128 tokens, each in a process of its own.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from bench.end_to_end import timed
from bench.harness import RESULTS, describe

HIDDEN, FEED_FORWARD, BLOCKS, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 22, 32, 4, 32000
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FEED_FORWARD, HIDDEN),
    "mlp.up_proj": (FEED_FORWARD, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED_FORWARD),
}


def make(folder: Path) -> None:
    """Write the checkpoint, with a tokenizer that has a token for each of 32000 words."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    generator = torch.Generator().manual_seed(0)
    parts = [{"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN)}]
    norms = [["model.norm"]]
    for index in range(BLOCKS):
        prefix = f"model.layers.{index}."
        parts.append({prefix + name: shape for name, shape in SHAPES.items()})
        norms.append([prefix + "input_layernorm", prefix + "post_attention_layernorm"])
    weight_map = {}
    for number, (matrices, vectors) in enumerate(zip(parts, norms, strict=True)):
        shard = f"model-{number:05d}.safetensors"
        tensors = {
            f"{name}.weight": (torch.randn(shape, generator=generator) * 0.02).bfloat16()
            for name, shape in matrices.items()
        }
        tensors |= {f"{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for name in vectors}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config.save_pretrained(folder)


def main() -> None:
    """Measure and rewrite ``bench/results/<machine>/memory.json``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else name)
        if not (folder / "config.json").is_file():
            make(folder)
        text = folder / "text.txt"
        numbers = torch.randint(VOCABULARY, (2000,), generator=torch.Generator().manual_seed(1))
        text.write_text(" ".join(f"w{number}" for number in numbers.tolist()))
        rows = [_measure(folder, method, Path(name)) for method in ("wanda", "sparsegpt")]
        imports = timed([sys.executable, "-c", _IMPORTS], Path(name) / "log")["peak_rss_bytes"]
    block = 2 * sum(rows * columns for rows, columns in SHAPES.values())
    parts = {
        "imports": imports,
        "largest_block_stored": block,
        "largest_block_float32": 2 * block,
        "gram_matrices": 4 * (3 * HIDDEN**2 + FEED_FORWARD**2),
        "hidden_states": 4 * 4 * 128 * HIDDEN,
    }
    found = {"machine": describe(torch.device("cpu")), "parts_bytes": parts, "rows": rows}
    target = RESULTS / found["machine"]["name"] / "memory.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


_IMPORTS = "import prunekit.running, prunekit.planning"


def _measure(model: Path, method: str, folder: Path) -> dict[str, object]:
    config = folder / f"{method}.toml"
    config.write_text(f"""
[model]
path = "{model.absolute()}"
[calibration]
data = "{(model / "text.txt").absolute()}"
samples = 4
length = 128
[prune]
method = "{method}"
pattern = "2:4"
measure_error = {"true" if method == "sparsegpt" else "false"}
[output]
path = "{folder / method}"
""")
    command = [sys.executable, "-m", "prunekit", "run", str(config), "--quiet"]
    row = {"method": method, **timed(command, folder / f"{method}.log")}
    report = json.loads((folder / method / "report.json").read_text())
    planned = {key: value for key, value in report["memory"].items() if key.endswith("_bytes")}
    return {**row, "report": planned, "achieved": report["sparsity"]["achieved"]}


if __name__ == "__main__":
    main()
