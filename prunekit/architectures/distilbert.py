"""DistilBERT."""

from prunekit.architectures.base import Architecture, Stack, Stage

STAGES = (
    Stage("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    Stage("attention.out_lin"),
    Stage("ffn.lin1"),
    Stage("ffn.lin2"),
)

DISTILBERT = Architecture(
    model_types=("distilbert",),
    stacks=(Stack(blocks="transformer.layer", stages=STAGES),),
)
