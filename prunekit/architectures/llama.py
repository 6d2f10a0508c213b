"""Llama and families with the same module names."""

from prunekit.architectures.base import Architecture, Attention, FeedForward, Stack, Stage, Stream

STAGES = (
    Stage("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    Stage("self_attn.o_proj"),
    Stage("mlp.gate_proj", "mlp.up_proj"),
    Stage("mlp.down_proj"),
)

ATTENTION = Attention(
    module="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    entries=(
        ("num_attention_heads", "heads"),
        ("num_key_value_heads", "groups"),
        ("head_dim", "size"),
    ),
)
FEED_FORWARD = FeedForward(inputs=("mlp.gate_proj", "mlp.up_proj"), output="mlp.down_proj")

LLAMA = Architecture(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    stacks=(
        Stack(
            blocks="layers",
            stages=STAGES,
            attentions=(ATTENTION,),
            feed_forwards=(FEED_FORWARD,),
        ),
    ),
    stream=Stream(),
)
