"""Stored parts on their way into the layers of vLLM; needs no vLLM."""

from pathlib import Path

import pytest
import torch

from prunekit.checkpoint.compressed import CompressedWeight
from prunekit.checkpoint.formats import WeightLayout, format_named
from prunekit.errors import CheckpointError
from prunekit.inference.vllm.loading import PartLoader

FOLDER = Path("some/small")


def weight(outputs=16, inputs=8, *, transposed=False):
    kind = format_named("2:4")
    layout = WeightLayout(outputs, inputs, outputs * inputs // 2, transposed)
    return CompressedWeight(kind, layout, {part: part for part in kind.parts})


@pytest.fixture
def fused():
    return PartLoader(FOLDER, {"q_proj": weight(), "k_proj": None, "v_proj": weight(4)})


def test_places_name_the_layers_of_a_fused_one(fused):
    values, dense = torch.zeros(4, 4), torch.zeros(4, 8)
    assert fused.receive("weight", values, "v") == ("v_proj", values)
    assert fused.receive("weight", values, 2)[0] == "v_proj"
    assert fused.receive("weight", dense, "k") == ("k_proj", dense)


@pytest.mark.parametrize("place", [None, "w", 3, -1, (0, 1)])
def test_other_places_are_refused(fused, place):
    with pytest.raises(CheckpointError, match="vLLM fuses q_proj, k_proj, v_proj in a way"):
        fused.receive("weight", torch.zeros(4, 4), place)


def test_a_layer_alone_needs_no_place():
    assert PartLoader(FOLDER, {"a": weight()}).receive("keep", _keep(16), None)[0] == "a"


def _keep(outputs):
    return torch.zeros(outputs, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("weight", torch.zeros(16, 8)),
        ("weight", torch.zeros(4, 16).t().contiguous().view(4, 16)),
        ("weight", torch.zeros(16, 4, dtype=torch.int16)),
        ("keep", torch.zeros(16, 1)),
        ("keep", torch.zeros(15, 1, dtype=torch.uint8)),
    ],
)
def test_other_types_and_shapes_are_refused_by_name(fused, part, tensor):
    with pytest.raises(CheckpointError, match=rf"some/small: q_proj: its {part} is .*2:4 weight"):
        fused.receive(part, tensor, "q")


def test_undoes_the_transposition_of_conv1d_weights():
    loader = PartLoader(FOLDER, {"c_attn": weight(8, 16, transposed=True)})
    values = torch.arange(64.0).view(8, 8)  # square, so that the shape does not tell
    _, stored = loader.receive("weight", values.t(), None)
    assert stored.equal(values)
    _, stored = loader.receive("weight", values, None)
    assert stored.equal(values)


def test_a_part_that_never_came_is_named(fused):
    for part, place in (("weight", "q"), ("keep", "q"), ("weight", "k"), ("weight", "v")):
        rows = 4 if place == "v" else 16
        fused.receive(part, torch.zeros(rows, 4) if part == "weight" else _keep(rows), place)
    with pytest.raises(CheckpointError, match=r"the files have no v_proj\.keep"):
        fused.check_complete()
    fused.receive("keep", _keep(4), "v")
    fused.check_complete()
