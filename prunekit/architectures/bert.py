"""BERT and the families that keep its names."""

from prunekit.architectures.base import Architecture, Stack, Stage

STAGES = (
    Stage("attention.self.query", "attention.self.key", "attention.self.value"),
    Stage("attention.output.dense"),
    Stage("intermediate.dense"),
    Stage("output.dense"),
)

BERT = Architecture(
    model_types=("bert", "roberta"),
    stacks=(Stack(blocks="encoder.layer", stages=STAGES),),
)
