"""Windows of tokens: which samples they hold, and their sums."""

import torch

import prunekit
from prunekit.structured.gated_model import GatedModel
from prunekit.structured.probes.token_windows import Observed, TokenWindows, window_numbers
from tests.support.rankers import TOKENS
from tests.support.units import randomized_model

SAMPLES, LENGTH = TOKENS.shape


def test_a_window_ends_with_the_sample_that_fills_it_and_takes_in_a_short_last_one():
    assert window_numbers([3, 3, 3, 3, 3], 6) == [0, 0, 1, 1, 2]
    assert window_numbers([3, 3, 3, 3, 2], 6) == [0, 0, 1, 1, 1]
    assert window_numbers([9, 1], 6) == [0, 0]
    assert window_numbers([1], 6) == [0]


def test_each_window_has_the_sums_of_its_samples_however_they_are_batched():
    model = randomized_model("llama")
    gates = prunekit.neurons(model)
    reader = Observed(gates.linear_groups[0].reader.linear, decodes=False)

    def windows(tokens, *sizes, size=4 * LENGTH):
        given = [{"input_ids": part} for part in tokens.split(sizes)]
        found = TokenWindows(GatedModel(model, [], gates.gates, given), [reader], size)
        return found.tokens, dict(found)

    tokens, found = windows(TOKENS, 3, 5, 2)
    assert tokens == [4 * LENGTH, 4 * LENGTH, 2 * LENGTH]
    for number, part in enumerate(TOKENS.split(4)):
        _, alone = windows(part, len(part))
        assert found[number].predictions == len(part) * (LENGTH - 1)
        (state,), (expected,) = found[number].states, alone[0].states
        torch.testing.assert_close(state[:9], expected[:9], rtol=1e-5, atol=1e-6)
