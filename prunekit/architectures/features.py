"""Encoders of sound, which read features in place of tokens."""

import math
from typing import Any

from torch import nn

FEATURES = "input_features"
"""Input of an encoder of sound: log-mel features [B, F, L] of L frames."""
FRAMES = "max_source_positions"
"""Entry of ``config.json`` for the tokens that an encoder makes of all frames of a sample."""


def reads_features(stack: Any) -> bool:  # noqa: ANN401
    """Return whether a stack reads sound features of sizes in its config."""
    config = getattr(stack, "config", None)
    sized = hasattr(config, "num_mel_bins") and hasattr(config, FRAMES)
    # A decoder alone has the same config and main input, but nothing that reads it.
    convolves = any(isinstance(each, nn.Conv1d) for each in stack.children())
    return getattr(stack, "main_input_name", None) == FEATURES and sized and convolves


def feature_shape(stack: Any) -> tuple[int, int]:  # noqa: ANN401
    """Return features per frame and frames per sample of a stack."""
    convolutions = (each for each in stack.children() if isinstance(each, nn.Conv1d))
    stride = math.prod(each.stride[0] for each in convolutions)
    return stack.config.num_mel_bins, getattr(stack.config, FRAMES) * stride
