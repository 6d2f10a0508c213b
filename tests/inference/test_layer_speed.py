"""Conclusions from measured layer speeds, and the compared implementations."""

import pytest
import torch

from prunekit.inference.layer_speed import (
    SpeedResults,
    SpeedRow,
    best_speedups,
    implementations,
    kernel_choices,
    verdicts,
)
from prunekit.inference.speed_table import KernelChoice


def rows(speeds, outputs=8, inputs=8):
    """Return rows of one layer with speedups ``speeds[M][way]`` over dense."""
    return [
        SpeedRow(outputs, inputs, tokens, way, 1 / speed, speed, 0.5, 0.1)
        for tokens, ways in speeds.items()
        for way, speed in {"dense": 1.0, **ways}.items()
    ]


def ways(*speeds):
    names = ("2:4", "2:4 expanded", "cuSPARSELt", "bitmask", "bitmask expanded")
    return dict(zip(names, speeds, strict=True))


MEASURED = {
    1: ways(1.7, 0.4, 0.9, 1.2, 0.3),
    64: ways(1.1, 0.8, 1.0, 0.5, 0.7),
    4096: ways(0.4, 0.9, 1.4, 0.1, 0.9),
}


def measured(rows):
    return SpeedResults("H200", "bfloat16", 4e12, 8e14, rows)


def test_verdicts_say_for_how_many_tokens_it_pays():
    two_four, bitmask = verdicts(measured(rows(MEASURED)))
    assert two_four == (
        "2:4 pays on H200 for every M measured (geometric mean over layers, dense is 1: 1.7x at "
        "M = 1, 1.1x at M = 64, 1.4x at M = 4096)."
    )
    assert bitmask.startswith("bitmask pays on H200 for M = 1 (")
    slow = {1: {"2:4": 0.5}}
    assert "does not pay on H200, it only saves memory" in verdicts(measured(rows(slow)))[0]


def test_layers_are_averaged_geometrically():
    both = rows({1: {"2:4": 2.0}}) + rows({1: {"2:4": 0.5}}, outputs=16)
    assert best_speedups(both, "2:4") == {1: pytest.approx(1.0)}


def test_choices_are_where_the_fastest_way_changes():
    found = kernel_choices(measured(rows(MEASURED)))
    assert found == {
        "2:4 bfloat16 8x8": KernelChoice(
            max_kernel_tokens=64, semi_structured=True, max_faster_tokens=4096
        ),
        "bitmask bfloat16 8x8": KernelChoice(
            max_kernel_tokens=1, semi_structured=False, max_faster_tokens=1
        ),
    }
    never = {1: {"2:4": 0.5, "2:4 expanded": 0.8, "bitmask": 0.5, "bitmask expanded": 0.6}}
    assert kernel_choices(measured(rows(never)))["2:4 bfloat16 8x8"] == KernelChoice(
        max_kernel_tokens=0, semi_structured=False
    )


def test_contestants_do_the_same_work():
    ways = implementations(24, 40, torch.float32, torch.device("cpu"))
    x = torch.randn(3, 40)
    (dense, *_), size = ways["dense"]
    assert size == 24 * 40 * 4
    for calls, _ in ways.values():
        for call in calls:
            torch.testing.assert_close(call(x), dense(x))
