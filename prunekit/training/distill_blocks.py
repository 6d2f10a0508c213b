"""Blocks and coordinates of a student and of its teacher."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from prunekit.architectures.adapters import bare_model
from prunekit.errors import ConfigError
from prunekit.models.units.base import Kept
from prunekit.models.units.blocks import block_groups
from prunekit.training.distill_losses import drawn_blocks
from prunekit.training.teachers import Teacher


class Target(NamedTuple):
    """A block of the teacher that was drawn.

    Attributes:
        quarter: Its quarter of depth.
        block: The block.
        decodes: Whether it is of a decoder with cross-attention.
        candidates: Blocks of the student that may be compared with it.
    """

    quarter: int
    block: nn.Module
    decodes: bool
    candidates: list[nn.Module]


class BlockMap:
    """Blocks of a student and of its teacher, by number.

    Depth counts through all stacks in execution order: of an encoder-decoder with equal stacks two
    quarters are the encoder's and two the decoder's. A block is compared with blocks of its own
    stack, since others may have other tokens.
    """

    def __init__(self, model: PreTrainedModel, teacher: Teacher, kept: Kept) -> None:
        """Number the blocks.

        Args:
            model: The student.
            teacher: Its teacher.
            kept: Kept blocks by the name of their list, if any were removed from the student.

        Raises:
            ConfigError: The teacher is of another family, or has other blocks and ``kept`` does not
                say which.
        """
        self._ours, self._theirs = block_groups(bare_model(model)), teacher.stacks
        names, others = ([stack.name for stack in each] for each in (self._ours, self._theirs))
        if names != others:
            raise ConfigError(
                f"teacher: it has blocks in {', '.join(others)}, the model in {', '.join(names)}. "
                "The teacher is the model before pruning."
            )
        self._numbers: dict[nn.Module, int] = {}
        for ours, theirs in zip(self._ours, self._theirs, strict=True):
            numbers = _block_numbers(ours.name, len(ours.blocks), len(theirs.blocks), kept)
            self._numbers |= {block: number for number, block in enumerate(theirs.blocks)}
            self._numbers |= dict(zip(ours.blocks, numbers, strict=True))

    def targets(self, seed: int, step: int, how: Literal["same", "closest"]) -> list[Target]:
        """Return the blocks that are drawn at a step, with their candidates.

        Args:
            seed: Seed of the draws.
            step: Number of the step.
            how: "same": the candidate is the same block, or the nearest that is left, of two the
                one before; "closest": all blocks of the stack are.
        """
        pairs = zip(self._ours, self._theirs, strict=True)
        every = [(block, ours, theirs) for ours, theirs in pairs for block in theirs.blocks]
        targets = []
        for quarter, number in drawn_blocks(len(every), seed, step).items():
            block, ours, theirs = every[number]
            candidates = [*ours.blocks]
            if how == "same":
                candidates = [min(candidates, key=lambda each: self._distance(each, block))]
            targets.append(Target(quarter, block, theirs.stack.reads is not None, candidates))
        return targets

    def _distance(self, ours: nn.Module, theirs: nn.Module) -> int:
        return abs(self._numbers[ours] - self._numbers[theirs])


def _block_numbers(name: str, ours: int, theirs: int, kept: Kept) -> Sequence[int]:
    """Return the number in the teacher of each block of a stack.

    Args:
        name: Name of the list of blocks.
        ours: Number of blocks of the student.
        theirs: Number of blocks of the teacher.
        kept: Kept blocks by name.
    """
    numbers = kept.get(name, range(ours))
    if len(numbers) != ours or (ours != theirs and name not in kept):
        raise ConfigError(
            f"distill: there are {ours} blocks in {name}, in the teacher {theirs}. Say which are "
            f"kept: kept={{{name!r}: [...]}}, as Finalized.kept has them."
        )
    return numbers


def stream_width(model: PreTrainedModel) -> int:
    """Return the features of a model's hidden states."""
    return bare_model(model).config.get_text_config().hidden_size


def kept_coordinates(model: PreTrainedModel, width: int, kept: Kept) -> Sequence[int] | None:
    """Return the student's coordinates among the teacher's; None for all.

    Args:
        model: The student.
        width: Coordinates of the teacher.
        kept: Kept coordinates by the name of the input embeddings, if any were removed.

    Raises:
        ConfigError: The numbers of coordinates differ, and ``kept`` does not say how.
    """
    bare, ours = bare_model(model), stream_width(model)
    if ours == width:
        return None
    table = bare.get_input_embeddings()
    name = next((path for path, module in bare.named_modules() if module is table), "")
    places = kept.get(name, ())
    if len(places) != ours:
        raise ConfigError(
            f"distill: hidden states have {ours} coordinates, the teacher's {width}. Say which are "
            f"kept: kept={{{name!r}: [...]}}, as Finalized.kept has them."
        )
    return places
