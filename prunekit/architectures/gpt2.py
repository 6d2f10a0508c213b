"""GPT-2, whose linears are ``Conv1D``: their weights are stored as [inputs, outputs]."""

from prunekit.architectures.base import Architecture, Stack, Stage

STAGES = (
    Stage("attn.c_attn"),
    Stage("attn.c_proj"),
    Stage("mlp.c_fc"),
    Stage("mlp.c_proj"),
)

GPT2 = Architecture(model_types=("gpt2",), stacks=(Stack(blocks="h", stages=STAGES),))
