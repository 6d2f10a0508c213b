"""OPT, whose base model wraps one decoder; ``project_in`` and ``project_out`` are no blocks."""

from prunekit.architectures.base import Architecture, Stack, Stage

STAGES = (
    Stage("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    Stage("self_attn.out_proj"),
    Stage("fc1"),
    Stage("fc2"),
)

OPT = Architecture(model_types=("opt",), stacks=(Stack(blocks="decoder.layers", stages=STAGES),))
