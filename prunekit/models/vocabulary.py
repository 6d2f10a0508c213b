"""Tokenizer, token embeddings and output head of a model."""

from collections.abc import Sequence

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prunekit.checkpoint.reader import Checkpoint
from prunekit.errors import ConfigError


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the tokenizer in the folder of a checkpoint.

    Raises:
        ConfigError: There is no tokenizer, or it needs custom code.
    """
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (ValueError, OSError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{checkpoint.folder}: has no tokenizer that can be loaded ({error})."
        ) from error


def vocabulary_modules(model: PreTrainedModel, stacks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the token embeddings and the output head, used outside the blocks.

    ``stacks``: encoder and decoder of the model, or the only one of them.
    """
    return list(dict.fromkeys([*input_embeddings(model, stacks), *output_heads(model)]))


def input_embeddings(model: PreTrainedModel, stacks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the token embeddings of the model and of its stacks."""
    found = [stack.get_input_embeddings() for stack in stacks]  # pyright: ignore
    return list(dict.fromkeys(filter(None, [model.get_input_embeddings(), *found])))


def output_heads(model: PreTrainedModel) -> list[nn.Module]:
    """Return the output head, or an empty list without one."""
    head = model.get_output_embeddings()
    return [] if head is None else [head]
