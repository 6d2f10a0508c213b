"""Block influence against the hidden states that transformers returns."""

import torch
from torch.nn.functional import cosine_similarity

import prunekit
from tests.support.units import batch, randomized_model

DEEPER = {
    "distilbert": {"n_layers": 3},
    "gpt2": {"n_layer": 3},
    "t5": {"num_layers": 3, "num_decoder_layers": 3},
}


def deeper(model_type, **overrides):
    return randomized_model(
        model_type, **DEEPER.get(model_type, {"num_hidden_layers": 3}), **overrides
    )


def test_block_influence_is_one_minus_the_cosine_of_what_goes_in_and_out():
    """The reference uses the hidden states of transformers, without padding."""
    model = deeper("llama")
    given = batch(model)
    with torch.no_grad():
        states = model.model(**given, output_hidden_states=True).hidden_states
    valid = given["attention_mask"].bool()
    gates = prunekit.blocks(model)
    (scores,) = gates.score("block-influence", [given]).values()
    for unit in (0, 1):  # the last hidden state follows the final norm
        found = cosine_similarity(states[unit].double(), states[unit + 1].double(), dim=-1)
        torch.testing.assert_close(scores[unit], 1 - found[valid].mean())
    gates.gates["model.layers"].keep[1] = False
    assert gates.score("block-influence", [given])["model.layers"][1].abs() < 1e-7
