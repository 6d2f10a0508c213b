"""Groups of a matrix, and scores that are hard to select."""

import math

import torch
from prunekit_kernels import Groups

OUTPUTS, INPUTS = 5, 200
HALF = OUTPUTS * INPUTS // 2

GROUPS = {
    "row": Groups(1, None, (77,)),
    "no row": Groups(1, None, (0,)),
    "whole row": Groups(1, None, (INPUTS,)),
    "layer": Groups(None, None, (HALF - 7,)),
    "no layer": Groups(None, None, (0,)),
    "whole layer": Groups(None, None, (2 * HALF,)),
    "windows": Groups(None, 64, (100, 0, 320, 20)),
    "ragged windows": Groups(None, 48, (100, 90, 110, 120, 3)),
    "1:2": Groups(1, 2, (1,)),
    "2:4": Groups(1, 4, (2,)),
    "1:4": Groups(1, 4, (3,)),
    "4:8": Groups(1, 8, (4,)),
    "2:5": Groups(1, 5, (3,)),
    "3:10": Groups(1, 10, (7,)),
    "18:25": Groups(1, 25, (7,)),
    "tiles": Groups(None, None, (13,), (5, 4)),
    "rows": Groups(None, None, (2,), (1, INPUTS)),
    "columns": Groups(None, None, (50,), (OUTPUTS, 1)),
}


def hard_scores(kind, shape, device):
    """Return distinct scores, tied ones, or with NaN and infinities."""
    generator = torch.Generator().manual_seed(len(kind) + shape[1])
    score = torch.randn(shape, generator=generator)
    if kind != "normal":
        score = torch.randint(-3, 4, shape, generator=generator).float()
    if kind == "broken":
        for number, value in ((3, math.nan), (2, math.inf), (-3, -math.inf), (0, -0.0)):
            score[score == number] = value
    if kind == "tiny":
        score *= 1e-42
    return score.to(device)


KINDS = ["normal", "equal", "broken", "tiny"]
EASY = ["normal", "equal"]
PATHS = ["row", "layer", "2:4", "2:5", "tiles"]
"""Groups of which each is chosen from in another way."""
