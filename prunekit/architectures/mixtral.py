"""Mixtral and Qwen3-MoE: Llama attention with experts that transformers fuses."""

from prunekit.architectures.base import Architecture, Stack, Stage
from prunekit.architectures.llama import ATTENTION, FEED_FORWARD, STAGES

EXPERTS = (
    Stage("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
    Stage("mlp.experts.*.down_proj"),
)

MIXTRAL = Architecture(
    model_types=("mixtral",),
    stacks=(Stack(blocks="layers", stages=(*STAGES[:2], *EXPERTS), attentions=(ATTENTION,)),),
)
QWEN3_MOE = Architecture(
    model_types=("qwen3_moe",),
    stacks=(
        Stack(
            blocks="layers",
            stages=(*STAGES, *EXPERTS),
            # A block has either a dense feed-forward or experts.
            optional=frozenset(
                linear for stage in (*STAGES[2:], *EXPERTS) for linear in stage.linears
            ),
            attentions=(ATTENTION,),
            feed_forwards=(FEED_FORWARD,),
        ),
    ),
)
