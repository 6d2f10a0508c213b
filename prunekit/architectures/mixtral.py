"""Mixtral and Qwen3's mixture: Llama's attention, and experts that transformers keeps fused."""

from prunekit.architectures.base import Architecture, Stack, Stage
from prunekit.architectures.llama import STAGES

EXPERTS = (
    Stage("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
    Stage("mlp.experts.*.down_proj"),
)

MIXTRAL = Architecture(
    model_types=("mixtral",),
    stacks=(Stack(blocks="layers", stages=(*STAGES[:2], *EXPERTS)),),
)
QWEN3_MOE = Architecture(
    model_types=("qwen3_moe",),
    stacks=(
        Stack(
            blocks="layers",
            stages=(*STAGES, *EXPERTS),
            # A block has either one feed-forward or experts.
            optional=frozenset(
                linear for stage in (*STAGES[2:], *EXPERTS) for linear in stage.linears
            ),
        ),
    ),
)
