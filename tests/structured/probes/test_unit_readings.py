"""How units are read: sums of the modules' inputs, scaled to a window, and constants."""

import pytest
import torch
from prunekit_kernels import new_state, salience

import prunekit
from prunekit.structured.probes.unit_readings import unit_readings
from tests.support.units import randomized_model


@pytest.mark.parametrize("kind", ["heads", "neurons", "hidden"])
def test_a_score_adds_its_modules_and_scales_activations_to_the_tokens(kind):
    model = randomized_model("llama")
    gates = getattr(prunekit, kind)(model)
    (name, reading), *_ = unit_readings(model, gates.groups, outliers=False).items()
    group = next(each for each in gates.groups if each.name == name)
    width = reading.moments.shape[1]
    assert width == group.units * reading.width
    generator = torch.Generator().manual_seed(0)
    states, expected = [], torch.zeros(group.units, dtype=torch.float64)
    for _ in reading.modules:
        h, g = (torch.randn(7, width, generator=generator) for _ in range(2))
        states.append(new_state(width))
        salience(h, g, states[-1])
        sums = h.double().abs().sum(0) * 70 / 7 * g.double().abs().sum(0)
        expected += sums.unflatten(0, (group.units, -1)).sum(1)
    before = [state.clone() for state in states]
    torch.testing.assert_close(reading.score(states, 70, "sums"), expected, rtol=1e-6, atol=0)
    assert all(map(torch.equal, before, states))


def test_outliers_of_weights_raise_the_score_of_coordinates_without_any_activation():
    model = randomized_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = 100
    gates = prunekit.hidden(model)
    (reading,) = unit_readings(model, gates.groups, outliers=True).values()
    (plain,) = unit_readings(model, gates.groups, outliers=False).values()
    assert int(reading.constant.argmax()) == 5
    assert not bool(plain.constant.any())
