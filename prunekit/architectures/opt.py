"""OPT, whose base model wraps one decoder.

``project_in`` and ``project_out`` are outside the blocks and are not pruned.
"""

from prunekit.architectures.base import Architecture, Attention, FeedForward, Stack, Stage

STAGES = (
    Stage("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    Stage("self_attn.out_proj"),
    Stage("fc1"),
    Stage("fc2"),
)

ATTENTION = Attention(
    module="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    counts=(("num_heads", "heads"),),
)
FEED_FORWARD = FeedForward(inputs=("fc1",), output="fc2", entry="ffn_dim")

OPT = Architecture(
    model_types=("opt",),
    stacks=(
        Stack(
            blocks="decoder.layers",
            stages=STAGES,
            attentions=(ATTENTION,),
            feed_forwards=(FEED_FORWARD,),
        ),
    ),
)
