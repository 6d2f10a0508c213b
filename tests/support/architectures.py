"""Tiny random models of every family: two or three blocks, 32 features, 96 words."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_BLOOM = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

TINY: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "distilbert": {
        "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64,
    },
    "gemma2": {**_DECODER, "head_dim": 8, "sliding_window": 4},
    "gemma3_text": {
        **_DECODER, "num_hidden_layers": 3, "head_dim": 8, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt2": _GPT,
    "gpt_neox": _ENCODER,
    "llama": _DECODER,
    "mistral": {**_DECODER, "sliding_window": 4},
    "opt": {
        "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    },
    "phi3": _DECODER,
    "qwen2": _DECODER,
    "qwen3": {**_DECODER, "head_dim": 8},
    "roberta": _ENCODER,
    "t5": {
        "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3,
        "num_heads": 4, "decoder_start_token_id": 0,
    },
}  # fmt: skip
"""Sizes of every declared model type, as its config takes them."""

UNDECLARED: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "cohere": {**_DECODER, "use_qk_norm": True},
    "deberta-v2": _ENCODER,
    "electra": {**_ENCODER, "embedding_size": 16},
    "falcon": {**_BLOOM, "multi_query": True},
    "glm": {**_DECODER, "head_dim": 8},
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
    },
    "gptj": {**_GPT, "rotary_dim": 4},
    "granite": _DECODER,
    "lfm2": {**_DECODER, "layer_types": ["conv", "full_attention"]},
    "modernbert": {**_ENCODER, "cls_token_id": 1, "sep_token_id": 2},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "olmo2": _DECODER,
    "phi": _DECODER,
    "stablelm": _DECODER,
    "starcoder2": _DECODER,
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
}  # fmt: skip
"""Sizes of model types without a declaration that probing finds."""

FUSED: dict[str, dict[str, Any]] = {
    "mixtral": {**_DECODER, "num_local_experts": 4},
    "qwen3_moe": {
        **_DECODER,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}
"""Sizes of declared model types whose experts transformers keeps fused."""

REFUSED: dict[str, dict[str, Any]] = {
    "albert": {**_ENCODER, "embedding_size": 16},
    "bart": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
    "qwen2_moe": {**_DECODER, "num_experts": 4, "moe_intermediate_size": 16},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
}  # fmt: skip
"""Sizes of model types that nothing can be done with yet."""


def tiny(model_type: str, head: Any = None, **overrides: Any) -> PreTrainedModel:
    """Return a seeded random model in eval mode and float32.

    Args:
        model_type: Any key of ``TINY``, ``FUSED``, ``UNDECLARED`` or ``REFUSED``.
        head: Auto class to build with; that of the usual language model if not given.
        overrides: Entries of the config that differ from the tiny ones.
    """
    sizes = {**TINY, **FUSED, **UNDECLARED, **REFUSED}[model_type]
    tokens = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **{**tokens, **sizes, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (head or _usual(config)).from_config(config).eval()


def _usual(config: Any) -> Any:
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    if type(config) in AutoModelForMaskedLM._model_mapping:
        return AutoModelForMaskedLM
    causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if causal else AutoModel
