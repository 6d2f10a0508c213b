"""GPT-NeoX and Pythia.

With parallel residuals, attention and feed-forward read the same stream through separate norms.
"""

from prunekit.architectures.base import Architecture, Attention, FeedForward, Stack, Stage

STAGES = (
    Stage("attention.query_key_value"),
    Stage("attention.dense"),
    Stage("mlp.dense_h_to_4h"),
    Stage("mlp.dense_4h_to_h"),
)

ATTENTION = Attention(
    module="attention",
    query="attention.query_key_value",
    key="attention.query_key_value",
    value="attention.query_key_value",
    output="attention.dense",
    size="head_size",
    interleaved=True,
)
FEED_FORWARD = FeedForward(inputs=("mlp.dense_h_to_4h",), output="mlp.dense_4h_to_h")

GPT_NEOX = Architecture(
    model_types=("gpt_neox",),
    stacks=(
        Stack(
            blocks="layers",
            stages=STAGES,
            attentions=(ATTENTION,),
            feed_forwards=(FEED_FORWARD,),
        ),
    ),
)
