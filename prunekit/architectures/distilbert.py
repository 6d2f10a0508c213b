"""DistilBERT."""

from prunekit.architectures.base import Architecture, Attention, FeedForward, Stack, Stage

STAGES = (
    Stage("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    Stage("attention.out_lin"),
    Stage("ffn.lin1"),
    Stage("ffn.lin2"),
)

ATTENTION = Attention(
    module="attention",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    size="attention_head_size",
    counts=(("n_heads", "heads"),),
)
FEED_FORWARD = FeedForward(inputs=("ffn.lin1",), output="ffn.lin2", entry="hidden_dim")

DISTILBERT = Architecture(
    model_types=("distilbert",),
    stacks=(
        Stack(
            blocks="transformer.layer",
            stages=STAGES,
            attentions=(ATTENTION,),
            feed_forwards=(FEED_FORWARD,),
        ),
    ),
)
