"""Models whose parts accelerate has placed on several devices."""

import copy

import pytest
import torch
from accelerate import dispatch_model

import prunekit
from tests.support.architectures import tiny

IDS = torch.arange(3, 35).view(4, 8)
MASKED = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS).tril(4)}


@pytest.mark.parametrize("kind", ["heads", "neurons", "blocks", "hidden"])
@pytest.mark.parametrize("ranker", ["gradient", "salience"])
def test_hooks_of_accelerate_change_no_score_and_stay(kind, ranker):
    whole = tiny("llama").eval()
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    parts += [f"model.layers.{number}" for number in range(whole.config.num_hidden_layers)]
    placed = dispatch_model(copy.deepcopy(whole), dict.fromkeys(parts, "cpu"), force_hooks=True)
    found = []
    for model in (whole, placed):
        gates = getattr(prunekit, kind)(model)
        if kind == "blocks" and ranker == "salience":
            ranker = "block-influence"
        scores = gates.score(ranker, [MASKED])
        gates.prune(scores, 0.34)
        gates.finalize([MASKED] if kind in {"heads", "neurons"} else None)
        with torch.inference_mode():
            found.append((scores, model(**MASKED).logits))
    (scores, logits), (others, same) = found
    assert all(torch.equal(score, others[name]) for name, score in scores.items())
    assert torch.equal(logits, same)
    assert hasattr(placed.model.layers[0], "_hf_hook")
