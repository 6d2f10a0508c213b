"""Phi-3: Llama with query, key and value in one linear, gate and up in another."""

from prunekit.architectures.base import Architecture, Stack, Stage

STAGES = (
    Stage("self_attn.qkv_proj"),
    Stage("self_attn.o_proj"),
    Stage("mlp.gate_up_proj"),
    Stage("mlp.down_proj"),
)

PHI3 = Architecture(model_types=("phi3",), stacks=(Stack(blocks="layers", stages=STAGES),))
