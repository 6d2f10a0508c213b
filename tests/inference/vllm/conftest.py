"""Checkpoints in all formats, and vLLM itself where the tier ``serve`` runs."""

import gc
import os
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunekit
from prunekit.inference.convert import convert
from tests.support import checkpoints
from tests.support.checkpoints import planned

PROMPTS = [[7, 8, 9, 10], [30, 20, 10]]
NEW = 12
if find_spec("vllm"):
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vLLM is imported
SIZES = {  # vLLM's attention on CPUs wants heads of 32, 48, 64 …
    "llama": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen2": {"hidden_size": 64, "num_attention_heads": 2, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 64, "n_head": 2},
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders by family and format: pruned 2:4, stored dense, 2:4 and as bitmask."""
    place = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunekit.reports.report.render", lambda report: "")
        for family, sizes in SIZES.items():
            made = checkpoints.write(place / f"{family}-whole", family, **sizes)
            list(prunekit.run(planned(made, place / family / "dense")))
            for kind in ("2:4", "bitmask"):
                convert(place / family / "dense", place / family / kind, kind)
    return place


@pytest.fixture
def served(monkeypatch):
    """A function that serves a folder and returns the tokens that vLLM generates."""

    def serve(folder, *, prompts=PROMPTS, environment=None, **options):
        from vllm import LLM, SamplingParams
        from vllm.distributed import cleanup_dist_env_and_memory

        for name, value in (environment or {}).items():
            monkeypatch.setenv(name, value)
        given = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 2}
        given |= {"distributed_executor_backend": "uni", "model": str(folder)} | options
        model = None
        try:
            model = LLM(**given)
            given = [{"prompt_token_ids": ids} for ids in prompts]
            wanted = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
            return [[*each.outputs[0].token_ids] for each in model.generate(given, wanted)]
        finally:
            del model
            cleanup_dist_env_and_memory()
            gc.collect()

    return serve


def tokens_of_transformers(folder, dtype=torch.float32, prompts=PROMPTS):
    """Return the tokens that transformers generates with prunekit."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found.append(model.generate(ids, **options)[0, len(prompt) :].tolist())
    return found
