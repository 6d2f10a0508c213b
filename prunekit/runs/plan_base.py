"""Base class of plans: the decisions that runs of every kind share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunekit.checkpoint.parts import whole_tensors
from prunekit.checkpoint.reader import Checkpoint
from prunekit.config.run_config import Config, StructuredConfig
from prunekit.config.train_table import Training
from prunekit.data.row_samples import RowSamples
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.formatting import size
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.vocabulary import token_limit
from prunekit.models.weight_names import stored_names


@dataclass(frozen=True, kw_only=True, repr=False)
class PlanBase(ABC):
    """Decisions about one run, taken before any weight is read.

    Attributes:
        config: The user's config.
        checkpoint: The files of the model.
        model: The model on the meta device, without weights.
        tokenizer: The tokenizer from the checkpoint folder; None for a run that reads no text.
        stacks: Runners of the model's block stacks.
        device: Device on which the model runs.
        dtype: Dtype in which the model runs.
        lengths: Tokens of a calibration sample and of an evaluation window, after the cap.
        notes: Messages for the user: caps, skipped layers, probing.
        ranks: Processes that carry out the run.
        sharded: The weights are sharded over the ranks while the model is trained.
        images: Calibration samples of images or sound with text, if the run reads any.
    """

    config: Config | StructuredConfig
    checkpoint: Checkpoint
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stacks: list[StackRunner]
    device: torch.device
    dtype: torch.dtype
    lengths: tuple[int, int]
    notes: tuple[str, ...]
    ranks: Ranks = SINGLE
    sharded: bool = False
    images: RowSamples | None = None

    def __repr__(self) -> str:
        config, pattern = self.config, self.config.prune.pattern
        words = " and ".join(pattern) if isinstance(pattern, list) else pattern.name
        return (
            f"<{type(self).__name__}: {config.model.path} by {config.prune.method.name}, {words}, "
            f"to {config.output.path}>"
        )

    @property
    def training(self) -> Training | None:
        """The training of the config, with the decision whether it is sharded."""
        training = self.config.training
        return training and training.model_copy(update={"sharded": self.sharded})

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of the model; tied ones count once."""
        stored = set(whole_tensors(stored_names(self.model, self.checkpoint).values()))
        return sum(math.prod(self.checkpoint.entries[name].shape) for name in stored)

    @property
    def joining(self) -> int:
        """Most bytes on disk beside the checkpoint while files are written."""
        return self._joining(self.config.output.max_shard_size)

    @property
    def least_joining(self) -> int:
        """The same with the smallest ``max_shard_size``."""
        return self._joining(1)

    def _joining(self, limit: int) -> int:
        # A shard is there until the last file with one of its tensors is finished.
        largest = max(entry.nbytes for entry in self.checkpoint.entries.values())
        return min(self.checkpoint.nbytes, max(limit, largest) + self.largest_shard)

    @cached_property
    def largest_shard(self) -> int:
        """Bytes of the largest file before files are joined."""
        stored = stored_names(self.model, self.checkpoint)
        entries = self.checkpoint.entries
        left = sum(entry.nbytes for entry in entries.values())
        sizes: list[int] = []
        for block in (name for runner in self.stacks for name in runner.names):
            inside = [stored[name] for name in stored if name.startswith(f"{block}.")]
            sizes.append(sum(entries[name].nbytes for name in whole_tensors(inside)))
        return max([*sizes, left - sum(sizes)])

    @property
    def joining_words(self) -> str:
        """The same for the printed plan."""
        return f", {size(self.joining)} more while its files are written"

    @property
    def token_limit(self) -> int:
        """Number of token ids that the model knows."""
        return token_limit(self.model, [runner.module for runner in self.stacks])

    @property
    def block_count(self) -> int:
        """Number of blocks in all stacks."""
        return sum(len(runner.blocks) for runner in self.stacks)

    @property
    @abstractmethod
    def prunable(self) -> int:
        """Number of parameters that the run can prune."""


# A str is markup to rich, so that a path with "[/b]" would raise; a Text is shown as it is.
def fact_table(facts: Mapping[str, str]) -> Table:
    """Return a table without borders of the main facts of a plan."""
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(Text(name, "bold"), Text(value))
    return table


def note_lines(notes: Iterable[str]) -> list[Text]:
    """Return the notes of a plan as lines to print."""
    return [Text.assemble(("note", "yellow"), f" {note}") for note in notes]
