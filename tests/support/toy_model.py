"""A toy transformers model with three blocks of three linears."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        y = x.clone()
        first = self.first(y)
        # The same storage with changed values, then a view of a different shape.
        y.relu_()
        return first + self.second(y) + self.third(y.flatten(0, 1)).view_as(y)


class Toy(PreTrainedModel):
    """A model that runs its blocks in order."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(4, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, inputs_embeds, use_cache):
        for block in self.blocks:
            inputs_embeds = block(inputs_embeds)
        return inputs_embeds
