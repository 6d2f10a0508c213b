"""BERT and families with the same module names."""

from prunekit.architectures.base import Architecture, Attention, FeedForward, Stack, Stage

STAGES = (
    Stage("attention.self.query", "attention.self.key", "attention.self.value"),
    Stage("attention.output.dense"),
    Stage("intermediate.dense"),
    Stage("output.dense"),
)

ATTENTION = Attention(
    module="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    size="attention_head_size",
    counts=(("num_attention_heads", "heads"), ("all_head_size", "width")),
)
FEED_FORWARD = FeedForward(inputs=("intermediate.dense",), output="output.dense")

BERT = Architecture(
    model_types=("bert", "roberta"),
    stacks=(
        Stack(
            blocks="encoder.layer",
            stages=STAGES,
            attentions=(ATTENTION,),
            feed_forwards=(FEED_FORWARD,),
        ),
    ),
)
