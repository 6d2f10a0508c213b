"""Llama and the families that keep its names."""

from prunekit.architectures.base import Architecture, Stack, Stage

STAGES = (
    Stage("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    Stage("self_attn.o_proj"),
    Stage("mlp.gate_proj", "mlp.up_proj"),
    Stage("mlp.down_proj"),
)

LLAMA = Architecture(
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"),
    stacks=(Stack(blocks="layers", stages=STAGES),),
)
