"""Prune one model with llm-compressor, in an environment of its own.

Usage: python peer_llmcompressor.py MODEL IDS.safetensors METHOD PATTERN OUT DTYPE

:mod:`bench.jobs.end_to_end` runs it. Its last line of output is the seconds of pruning, without
start-up and loading.
"""

import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

model_path, ids_path, method, pattern, out, dtype = sys.argv[1:]
ids = load_file(ids_path)["ids"]
model = AutoModelForCausalLM.from_pretrained(
    model_path, dtype=getattr(torch, dtype), trust_remote_code=False
)
tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
data = Dataset.from_dict(
    {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
)
kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
structure = pattern if ":" in pattern else "0:0"
sparsity = 0.5 if ":" in pattern else float(pattern)
modifier = kind(sparsity=sparsity, mask_structure=structure, ignore=["re:.*lm_head"])
began = time.perf_counter()
oneshot(
    model=model,
    tokenizer=tokenizer,
    dataset=data,
    recipe=modifier,
    num_calibration_samples=len(ids),
    max_seq_length=ids.shape[1],
    shuffle_calibration_samples=False,
    output_dir=out,
)
print(time.perf_counter() - began)
