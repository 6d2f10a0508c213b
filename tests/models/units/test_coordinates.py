"""Axes of the coordinates, found by a config of another width."""

import pytest

from prunekit.errors import ShapeError
from prunekit.models.units.coordinates import coordinate_axes, head_sizes, width_key, width_step
from tests.support.units import randomized_model


def test_every_axis_of_the_width_and_no_other_is_found():
    model = randomized_model("llama")
    width = model.config.hidden_size
    found = {(id(each.parameter), each.axis) for each in coordinate_axes(model)}
    expected = {
        (id(parameter), axis)
        for name, parameter in model.named_parameters()
        for axis, size in enumerate(parameter.shape)
        if size == width
        and not (name.endswith(("o_proj.weight",)) and axis == 1)
        and not (name.endswith(("q_proj.weight",)) and axis == 0)
    }
    assert found == expected
    assert width_key(model) == "hidden_size"
    assert head_sizes(model) == {"head_dim": model.config.head_dim}
    assert width_step(model, head_sizes(model)) == model.config.num_attention_heads


def test_an_axis_that_grows_more_is_refused():
    with pytest.raises(ShapeError, match="more than the coordinates"):
        coordinate_axes(randomized_model("gpt2"))
