"""Tokenizer, token embeddings and output head of a model."""

from collections.abc import Sequence

import tokenizers
import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunekit.architectures.block_lists import own_embeddings
from prunekit.checkpoint.reader import Checkpoint
from prunekit.errors import ConfigError, is_out_of_memory
from prunekit.models import stock


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the tokenizer in the folder of a checkpoint.

    Raises:
        ConfigError: There is no tokenizer, it needs custom code, or its files are damaged or of a
            newer version.
    """
    try:
        return stock.read_tokenizer(checkpoint.folder)
    except Exception as error:  # tokenizers raises Exception itself for files it cannot parse
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"{checkpoint.folder}: has no tokenizer that can be loaded ({stock.describe(error)}). "
            "Code of its own is never run; its files may need newer versions than transformers "
            f"{transformers.__version__} and tokenizers {tokenizers.__version__}."
        ) from error


def token_limit(model: PreTrainedModel, stacks: Sequence[nn.Module]) -> int:
    """Return the number of token ids that the model knows.

    Both the embeddings and the output head have a row for each.

    ``stacks``: as for :func:`vocabulary_modules`.
    """
    rows = [
        module.weight.shape[0]
        for module in vocabulary_modules(model, stacks)
        if isinstance(module, nn.Embedding | nn.Linear)
    ]
    return min(rows, default=model.config.get_text_config().vocab_size)


def vocabulary_modules(model: PreTrainedModel, stacks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the token embeddings and the output head, used outside the blocks.

    ``stacks``: encoder and decoder of the model, or the only one of them.
    """
    return list(dict.fromkeys([*input_embeddings(model, stacks), *output_heads(model)]))


def input_embeddings(model: PreTrainedModel, stacks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the token embeddings of the model and of its stacks."""
    found = map(own_embeddings, stacks)
    return list(dict.fromkeys(filter(None, [model.get_input_embeddings(), *found])))


def output_heads(model: PreTrainedModel) -> list[nn.Module]:
    """Return the output head, or an empty list without one."""
    head = model.get_output_embeddings()
    return [] if head is None else [head]
