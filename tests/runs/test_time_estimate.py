"""Time estimates: words, and the layer that is measured."""

import pytest
import torch

from prunekit.runs.time_estimate import (
    WIDEST,
    TimeEstimate,
    measured_layer,
    operations_text,
    shortest_seconds,
)

CPU = torch.device("cpu")


def test_it_is_said_a_block_too():
    told = TimeEstimate({"forward": 40.0, "solving": 20.0}).describe(4)
    assert told.startswith("about 1 min")
    assert told.endswith("files apart: forward 40.0 s, solving 20.0 s")


@pytest.mark.parametrize(
    ("inputs", "measured"), [(96, 96), (4096, 1024), (11008, 2752), (5000, 5000)]
)
def test_a_wide_layer_is_measured_in_part(inputs, measured):
    x, weight = measured_layer(3000, inputs, CPU, torch.float32)
    assert weight.shape == (WIDEST, measured)
    assert x.shape[1] == measured


def test_the_first_call_is_not_timed():
    calls = []
    assert shortest_seconds(lambda: calls.append(1), CPU) >= 0
    assert len(calls) == 4


def test_operations_are_told_in_tera():
    assert operations_text({"forward": 2.5e15, "solving": 0}) == "forward 2.5e+03, solving 0 TFLOP"
