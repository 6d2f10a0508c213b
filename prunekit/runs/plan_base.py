"""Base class of plans: the decisions that runs of every kind share."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunekit.checkpoint.reader import Checkpoint
from prunekit.config.run_config import Config, StructuredConfig
from prunekit.distributed.ranks import SINGLE, Ranks
from prunekit.models.sequential.block_runner import StackRunner
from prunekit.models.weight_names import stored_names


@dataclass(frozen=True, kw_only=True)
class PlanBase(ABC):
    """Decisions about one run, taken before any weight is read.

    Attributes:
        config: The user's config.
        checkpoint: The files of the model.
        model: The model on the meta device, without weights.
        tokenizer: The tokenizer from the checkpoint folder.
        stacks: Runners of the model's block stacks.
        device: Device on which the model runs.
        dtype: Dtype in which the model runs.
        lengths: Tokens of a calibration sample and of an evaluation window, after the cap.
        notes: Messages for the user: caps, skipped layers, probing.
        ranks: Processes that carry out the run.
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

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of the model; tied ones count once."""
        stored = set(stored_names(self.model, self.checkpoint).values())
        return sum(math.prod(self.checkpoint.entries[name].shape) for name in stored)

    @property
    def block_count(self) -> int:
        """Number of blocks in all stacks."""
        return sum(len(runner.blocks) for runner in self.stacks)

    @property
    @abstractmethod
    def prunable(self) -> int:
        """Number of parameters that the run can prune."""
