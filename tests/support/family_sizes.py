"""Sizes that make configs of any model type tiny, and what single types need besides."""

from typing import Any

_NAMES: dict[float, str] = {
    0: "num_kv_shared_layers num_mtp_layers num_nextn_predict_layers",
    1: (
        "first_k_dense_replace interleave_moe_layer_step mamba_n_groups mamba_ngroups "
        "moe_layer_interval moe_layer_start_index moe_num_shared_experts n_group n_groups "
        "n_shared_experts num_dense_layers num_expert_group num_expert_groups "
        "num_global_key_value_heads num_hash_layers num_shared_experts topk_group "
    ),
    2: (
        "altup_num_inputs decoder_layers depth encoder_layers hc_mult index_n_heads "
        "linear_num_key_heads moe_k moe_top_k moe_topk multi_query_group_num n_head_kv n_layer "
        "n_layers n_mamba_heads num_decoder_layers num_encoder_layers num_experts_per_tok "
        "num_experts_per_tok_none num_experts_per_token num_hidden_layers num_key_value_heads "
        "num_kv_heads num_layers num_memory_blocks swa_num_key_value_heads temporal_patch_size "
        "top_k_experts type_vocab_size zero_expert_num "
    ),
    3: "conv_L_cache in_channels",
    4: (
        "attention_heads decoder_attention_heads encoder_attention_heads ffn_num_experts "
        "linear_num_value_heads mamba_dt_rank mamba_n_heads mamba_num_heads moe_num_experts "
        "n_head n_heads n_routed_experts num_attention_heads num_experts num_heads "
        "num_local_experts num_query_tokens qk_rope_head_dim query_length rotary_dim "
        "swa_num_attention_heads time_step_rank "
    ),
    8: (
        "adapter_rank attention_head_dim block_multiple_of d_kv global_head_dim head_dim "
        "head_size hidden_size_per_layer_input index_head_dim kv_channels laurel_rank "
        "linear_key_head_dim linear_value_head_dim lora_rank mamba_d_state patch_size ple_dim "
        "qk_nope_head_dim query_pre_attn_scalar rank spatial_patch_size ssm_state_size state_size "
        "swa_head_dim swa_v_head_dim use_mem_rank v_head_dim "
    ),
    12: "qk_head_dim",
    16: (
        "attention_window_size chunk_size expert_dim expert_ffn_hidden_size "
        "expert_intermediate_size kv_lora_rank mamba_chunk_size mamba_d_head mamba_head_dim "
        "moe_ffn_hidden_size moe_intermediate_size num_buckets num_position_embeddings "
        "o_lora_rank q_lora_rank window_size "
    ),
    24: (
        "moe_shared_expert_intermediate_size shared_expert_intermediate_size "
        "shared_intermediate_size "
    ),
    32: (
        "attention_size cross_attention_hidden_size d_model decoder_hidden_size dim emb_dim "
        "embed_dim embedding_size encoder_hidden_size hidden_size image_size lru_width "
        "mm_hidden_size n_embd out_hidden_size projection_dim projector_hidden_size text_dim "
        "text_hidden_size vision_hidden_size word_embed_proj_dim "
    ),
    48: "intermediate_size_mlp",
    64: (
        "attention_hidden_size d_ff decoder_ffn_dim dense_intermediate_size encoder_ffn_dim "
        "ffn_dim ffn_hidden_size hidden_dim index_topk intermediate_size mamba_d_ssm mlp_dim "
        "n_inner sliding_window "
    ),
    96: "text_vocab_size vocab_size vocab_size_per_layer_input",
    99: "max_window_layers moe_layer_end_index",
    128: (
        "max_position_embeddings max_sequence_length max_source_positions max_target_positions "
        "n_positions "
    ),
    10000.0: "compress_rope_theta",
}
SIZES: dict[str, float] = {name: size for size, names in _NAMES.items() for name in names.split()}
"""Size of each config entry, wherever it is."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "num_hidden_layers": 4},
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 16,
            "hidden_size": 32,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
        "max_seq_len": 128,
    },
    "deepseek_v2": {"head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 4},
        "head_dim": 8,
        "num_key_value_heads": 1,
        "o_groups": 2,
        "partial_rotary_factor": 0.5,
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
            for name in ("main", "compress")
        },
    },
    "esm": {"mask_token_id": 3, "position_embedding_type": "rotary", "vocab_size": 96},
    "esmc": {"num_key_value_heads": 4},
    "dots1": {
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
    },
    "gemma3n_text": {
        "activation_sparsity_pattern": [0.0, 0.0, 0.0, 0.0],
        "intermediate_size": [64, 64, 64, 64],
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
    },
    "gemma4": {
        "text_config": {
            "layer_types": [
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}},
        },
    },
    "gemma4_text": {
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}},
    },
    "glm46v": {
        "text_config": {
            "rope_parameters": {
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 1.0,
                "rope_theta": 10000.0,
                "rope_type": "default",
            }
        }
    },
    "glm4v": {
        "text_config": {
            "rope_parameters": {
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 1.0,
                "rope_theta": 10000.0,
                "rope_type": "default",
            }
        }
    },
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 1.0,
                "rope_theta": 10000.0,
                "rope_type": "default",
            }
        }
    },
    "glm_ocr": {
        "text_config": {
            "rope_parameters": {
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 1.0,
                "rope_theta": 10000.0,
                "rope_type": "default",
            }
        }
    },
    "glmga": {
        "text_config": {
            "rope_parameters": {
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 1.0,
                "rope_theta": 10000.0,
                "rope_type": "default",
            }
        }
    },
    "gpt_oss": {"pad_token_id": 0},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_local_experts": 4,
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": [2, 2], "num_experts": 4},
    "inkling2": {"text_config": {"d_rel": 4, "rel_extent": 8}},
    "inkling2_text": {"d_rel": 4, "rel_extent": 8},
    "inkling_text": {"d_rel": 4, "rel_extent": 8},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "num_hidden_layers": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "llama4": {"pad_token_id": 0, "text_config": {"pad_token_id": 0}},
    "luke": {"entity_emb_size": 8, "entity_vocab_size": 16},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "marian": {"decoder_vocab_size": 96, "pad_token_id": 0},
    "minicpm3": {"head_dim": None},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl": {
        "text_config": {
            "rope_parameters": {
                "mrope_section": [2, 1, 1],
                "rope_theta": 10000.0,
                "rope_type": "default",
            }
        }
    },
    "qwen2_5_omni_thinker": {
        "text_config": {
            "rope_parameters": {
                "mrope_section": [2, 1, 1],
                "rope_theta": 10000.0,
                "rope_type": "default",
            }
        }
    },
    "qwen2_5_vl": {
        "text_config": {
            "rope_parameters": {
                "mrope_section": [2, 1, 1],
                "rope_theta": 10000.0,
                "rope_type": "default",
            }
        }
    },
    "qwen2_vl": {
        "text_config": {
            "rope_parameters": {
                "mrope_section": [2, 1, 1],
                "rope_theta": 10000.0,
                "rope_type": "default",
            }
        }
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "rwkv": {"attention_hidden_size": 32},
    "xlnet": {"d_head": 8},
    "zamba": {
        "attention_head_dim": 16,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"],
        "num_hidden_layers": 6,
    },
    "zamba2": {
        "hybrid_layer_ids": [1, 3],
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "num_hidden_layers": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Entries of single model types, after the sizes."""
