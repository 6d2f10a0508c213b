"""Phi-3: Llama with fused query-key-value and gate-up linears."""

from prunekit.architectures.base import Architecture, Attention, FeedForward, Stack, Stage, Stream

STAGES = (
    Stage("self_attn.qkv_proj"),
    Stage("self_attn.o_proj"),
    Stage("mlp.gate_up_proj"),
    Stage("mlp.down_proj"),
)

ATTENTION = Attention(
    module="self_attn",
    query="self_attn.qkv_proj",
    key="self_attn.qkv_proj",
    value="self_attn.qkv_proj",
    output="self_attn.o_proj",
    counts=(("num_key_value_heads", "groups"), ("config.num_attention_heads", "heads")),
    entries=(
        ("num_attention_heads", "heads"),
        ("num_key_value_heads", "groups"),
        ("head_dim", "size"),
    ),
)
FEED_FORWARD = FeedForward(inputs=("mlp.gate_up_proj",), output="mlp.down_proj")

PHI3 = Architecture(
    model_types=("phi3",),
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
