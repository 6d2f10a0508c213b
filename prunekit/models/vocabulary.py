"""TODO-DOC prunekit/models/vocabulary.py (out of prunekit/evaluation.py)."""

from collections.abc import Sequence

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prunekit.checkpoint.reader import Checkpoint
from prunekit.errors import ConfigError
from prunekit.models.sequential.block_runner import StackRunner


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Return the tokenizer that lies beside a checkpoint.

    Raises:
        ConfigError: There is none, or only one that needs code of its own.
    """
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (ValueError, OSError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{checkpoint.folder}: has no tokenizer that can be loaded ({error})."
        ) from error


def vocabulary(model: PreTrainedModel, stacks: Sequence[StackRunner]) -> list[nn.Module]:
    """Return the modules with a row for each token, which are used only at the two ends."""
    return list(dict.fromkeys([*embeddings(model, stacks), *heads(model)]))


def embeddings(model: PreTrainedModel, stacks: Sequence[StackRunner]) -> list[nn.Module]:
    """Return what turns tokens into vectors."""
    found = [runner.module.get_input_embeddings() for runner in stacks]  # pyright: ignore
    return list(dict.fromkeys(filter(None, [model.get_input_embeddings(), *found])))


def heads(model: PreTrainedModel) -> list[nn.Module]:
    """Return what turns vectors into tokens, if the model does."""
    head = model.get_output_embeddings()
    return [] if head is None else [head]
