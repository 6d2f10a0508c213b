"""Tiny random models of every family, and a check of declared stages.

Models have two or three blocks, 32 features and a vocabulary of 96.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from prunekit.architectures import Architecture
from prunekit.architectures.coverage import named_linears

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
"""Config sizes of every declared model type without experts."""

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
"""Sizes of model types without a declaration that can be probed."""

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
"""Config sizes of declared model types whose experts transformers fuses."""

_EXPERTS = {**_DECODER, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

EXPERTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **_EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
    },
    "gpt_oss": {**_DECODER, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**_DECODER, "intermediate_size": 16, "num_local_experts": 4},
    "jamba": {
        **_DECODER, "num_hidden_layers": 4, "num_experts": 4, "attn_layer_offset": 1,
        "attn_layer_period": 2, "mamba_d_state": 8, "mamba_dt_rank": 4,
    },
    "olmoe": {**_DECODER, "intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {**_DECODER, "intermediate_size": 16, "num_local_experts": 4},
    "qwen2_moe": {
        **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24,
    },
}  # fmt: skip
"""Sizes of model types with experts that are not declared, but known from a forward."""

WITHOUT_GATE = {
    "num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "moe"],
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
    "moe_shared_expert_intermediate_size": 24, "topk_group": 1,
}  # fmt: skip
"""Sizes that make of ``nemotron_h`` a model whose experts have no gate."""

OTHERS: dict[str, dict[str, Any]] = {
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "dff": 64},
    "gemma4_text": {
        **_DECODER, "num_hidden_layers": 3, "head_dim": 8, "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 8, "per_layer_config": {2: {"head_dim": 16}},
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "llava": {
        "text_config": {"model_type": "llama", "vocab_size": 96, **_DECODER},
        "vision_config": {
            "model_type": "clip_vision_model", **_ENCODER, "image_size": 16, "patch_size": 8,
            "projection_dim": 32,
        },
        "image_token_index": 90,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
}  # fmt: skip
"""Sizes of model types that run from token ids, have towers, layers of several sizes, or linears
that a forward never calls."""

_HYBRID = {**_DECODER, "num_hidden_layers": 4}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_n_groups": 1}
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "head_dim": 8,
}  # fmt: skip
_TWO_KINDS = ["linear_attention", "full_attention"] * 2

HYBRID: dict[str, dict[str, Any]] = {
    "bamba": {**_HYBRID, **_MAMBA, "mamba_d_head": 16, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**_HYBRID, **_MAMBA, "mamba_d_head": 8, "mamba_d_ssm": 32},
    "granitemoehybrid": {
        **_HYBRID, **_MAMBA, "mamba_d_head": 16, "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 0, "shared_intermediate_size": 64,
    },
    "lfm2": {**_HYBRID, "layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": {
        **_HYBRID, "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1,
        "ssm_state_size": 8, "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
    },
    "qwen3_5_text": {**_HYBRID, **_DELTA, "layer_types": _TWO_KINDS},
    "qwen3_next": {
        **_HYBRID, **_DELTA, "layer_types": _TWO_KINDS, "num_experts": 0,
        "mlp_only_layers": [0, 1, 2, 3],
    },
}  # fmt: skip
"""Sizes of model types with four blocks of several kinds."""

_SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "max_position_embeddings": 64, "decoder_start_token_id": 0,
}  # fmt: skip

ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "bart": _SEQ2SEQ,
    "marian": {**_SEQ2SEQ, "decoder_vocab_size": 96},
    "switch_transformers": {
        "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
        "num_experts": 4, "expert_capacity": 8, "decoder_start_token_id": 0,
    },
}  # fmt: skip
"""Sizes of encoder-decoders without a declaration."""

OWN_EXPERTS: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2,
        },
    },
    "llama4_text": {
        **_DECODER, "intermediate_size": 16, "intermediate_size_mlp": 64, "num_local_experts": 4,
        "head_dim": 8, "pad_token_id": 0,
    },
    "longcat_flash": {
        **_DECODER, "num_layers": 2, "num_hidden_layers": 2, "num_key_value_heads": 4,
        "ffn_hidden_size": 64, "expert_ffn_hidden_size": 16, "n_routed_experts": 4,
        "zero_expert_num": 2, "moe_topk": 2, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
    },
}  # fmt: skip
"""Sizes of model types whose experts are outside of the experts interface of transformers."""

_SHARED_KEYS = {
    **_DECODER, "num_hidden_layers": 4, "head_dim": 8, "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip

SHARED_KEYS: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        **_SHARED_KEYS, "intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.0] * 4,
        "laurel_rank": 8, "altup_num_inputs": 2,
    },
    "gemma4_text": {**_SHARED_KEYS, "per_layer_config": {}},
}  # fmt: skip
"""Sizes of model types whose last blocks read the keys and values of earlier ones."""

CONVERTED: dict[str, dict[str, Any]] = {
    "nomic_bert": {**_ENCODER, "head_dim": 8},
    "olmo_hybrid": {**_HYBRID, **_DELTA, "layer_types": _TWO_KINDS},
}  # fmt: skip
"""Sizes of model types of which transformers splits or joins tensors on loading."""

REFUSED: dict[str, dict[str, Any]] = {
    "albert": {**_ENCODER, "embedding_size": 16},
    "jetmoe": {
        **_DECODER, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
        "kv_channels": 8,
    },
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
}  # fmt: skip
"""Sizes of model types that are not supported."""


def tiny(model_type: str, head: Any = None, **overrides: Any) -> PreTrainedModel:
    """Return a seeded random model in eval mode and float32.

    Args:
        model_type: Any key of the tables above.
        head: Auto class to build with; by default the language model class of the config.
        overrides: Config entries that replace the tiny defaults.
    """
    sizes = {
        **EXPERTS, **HYBRID, **TINY, **FUSED, **UNDECLARED, **OTHERS, **REFUSED,
        **ENCODER_DECODERS, **OWN_EXPERTS, **SHARED_KEYS, **CONVERTED,
    }[model_type]  # fmt: skip
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


def assert_stages_match_forward(model: PreTrainedModel, architecture: Architecture) -> None:
    """Assert that stages are the groups of linears sharing an input.

    Inputs are recorded in one forward, with every stack run from embeddings. Groups are ordered by
    their first call, names within a group by call.
    """
    base, last = model.base_model, {}
    for stack in architecture.stacks:
        calls = record_linear_inputs(base.get_submodule(stack.blocks))
        embeddings = torch.randn(2, 5, model.get_input_embeddings().weight.shape[1])
        context = {"encoder_hidden_states": last[stack.reads]} if stack.reads else {}
        module = base.get_submodule(stack.module)
        with torch.no_grad():
            out = module(inputs_embeds=embeddings, use_cache=False, **context)
        last[stack.module] = out.last_hidden_state
        every = zip(base.get_submodule(stack.blocks), calls, strict=True)
        for index, (block, reads) in enumerate(every):
            groups: dict[int, list[str]] = {}
            dense = dict(stack.dense)
            for name, x in ((name, x) for name, x in reads if name not in dense):
                groups.setdefault(id(x), []).append(name)
            stages = stack.stages_of(index, (name for name, _ in block.named_modules()))
            named = [
                [name for name in stage.linears if name in named_linears(block)] for stage in stages
            ]
            assert list(groups.values()) == [stage for stage in named if stage]
            called = [name for name, _ in reads if name not in dense]
            assert sorted(called) == sorted(named_linears(block).keys() - dense.keys())


def record_linear_inputs(blocks: nn.Module) -> list[list[tuple[str, torch.Tensor]]]:
    """Return one list per block, which a forward fills with (linear, input)."""
    calls = [[] for _ in blocks.children()]
    for record, block in zip(calls, blocks.children(), strict=True):
        for name, linear in named_linears(block).items():
            linear.register_forward_pre_hook(
                lambda _, args, name=name, record=record: record.append((name, args[0]))
            )
    return calls
