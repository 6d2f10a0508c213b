"""GPT-2, whose ``Conv1D`` linears store weights as [inputs, outputs]."""

from prunekit.architectures.base import Architecture, Attention, FeedForward, Stack, Stage

STAGES = (
    Stage("attn.c_attn"),
    Stage("attn.c_proj"),
    Stage("mlp.c_fc"),
    Stage("mlp.c_proj"),
)

ATTENTION = Attention(
    module="attn",
    query="attn.c_attn",
    key="attn.c_attn",
    value="attn.c_attn",
    output="attn.c_proj",
    counts=(("num_heads", "heads"), ("split_size", "width")),
)
FEED_FORWARD = FeedForward(inputs=("mlp.c_fc",), output="mlp.c_proj", entry="n_inner")

GPT2 = Architecture(
    model_types=("gpt2",),
    stacks=(
        Stack(
            blocks="h",
            stages=STAGES,
            attentions=(ATTENTION,),
            feed_forwards=(FEED_FORWARD,),
        ),
    ),
)
