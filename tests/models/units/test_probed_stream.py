"""Residual streams of undeclared families: equal to declarations, exact, or refused."""

import pytest
import torch
from torch import nn

import prunekit
from prunekit.architectures import find_architecture
from prunekit.errors import ShapeError
from prunekit.models.units.coordinates import head_sizes
from prunekit.models.units.probed_stream import probe_stream
from tests.support.family_configs import model_class, tiny_config
from tests.support.family_units import unit_problem
from tests.support.tiers import often
from tests.support.units import batch, randomized_model, valid_logits

IDS = torch.arange(1, 13)[None]
TYPES = ("deepseek_v3", "gpt_oss", "granite", "glm", "smollm3", "qwen3_moe", "mixtral")


def made(model_type):
    """Return a tiny random model whose norms and biases are random too."""
    config = tiny_config(model_type)
    model = model_class("causal", config)(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(float(weight.ndim == 1), 0.2, generator=generator)
    return model


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text", "phi3", "qwen2"])
def test_what_is_probed_of_a_declared_family_is_its_declaration(model_type):
    """Offset 1 and embeddings times the root of the width in Gemma; ε of the config."""
    model = randomized_model(model_type)
    architecture = find_architecture(model)
    assert probe_stream(model, architecture, head_sizes(model)) == architecture.stream


@pytest.mark.parametrize("model_type", often(TYPES, ("deepseek_v3", "gpt_oss", "smollm3")))
def test_a_narrower_model_answers_as_the_gated_one(model_type):
    assert unit_problem(made(model_type), "hidden", IDS) is None


def test_a_narrower_model_opens_as_stock(tmp_path):
    model = randomized_model("granite")
    gates = prunekit.hidden(model)
    gates.prune(gates.score("magnitude"), 0.25)
    gates.finalize()
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path, trust_remote_code=False).eval()
    given = batch(model)
    assert torch.equal(valid_logits(opened, given), valid_logits(model, given))


def test_a_stream_that_is_read_without_a_norm_is_refused():
    """OLMo 2 normalises what blocks write, not what they read."""
    with pytest.raises(ShapeError, match=r"layers.0.self_attn.q_proj reads the residual stream"):
        prunekit.hidden(made("olmo2"))


def test_a_layer_norm_is_refused():
    with pytest.raises(ShapeError, match="mean over fewer coordinates"):
        prunekit.hidden(made("cohere"))


@pytest.mark.parametrize(
    ("name", "change"),
    [("mul", lambda x, size: x * size**-0.5), ("div", lambda x, size: x / size)],
)
def test_numbers_that_follow_from_the_width_are_refused(name, change, monkeypatch):
    forward = type(randomized_model("granite").model).forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.last_hidden_state = change(output.last_hidden_state, self.config.hidden_size)
        return output

    monkeypatch.setattr(type(randomized_model("granite").model), "forward", scaled)
    with pytest.raises(
        ShapeError, match=rf"forward calls {name} with .* which follows from the width"
    ):
        prunekit.hidden(randomized_model("granite"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("roll", lambda x: x.roll(1, -1)),
        ("index", lambda x: x[..., torch.arange(x.shape[-1] - 1, -1, -1)]),
        ("index_select", lambda x: x.index_select(-1, torch.arange(x.shape[-1]))),
        ("mean", lambda x: x.mean(-1, keepdim=True)),
    ],
)
def test_coordinates_that_are_combined_are_refused(name, change, monkeypatch):
    """Here each is added to another one, or to their mean."""
    block = type(randomized_model("granite").model.layers[0])
    forward = block.forward

    def mixed(self, hidden_states, *args, **kwargs):
        return forward(self, hidden_states + change(hidden_states), *args, **kwargs)

    monkeypatch.setattr(block, "forward", mixed)
    with pytest.raises(ShapeError, match=f"{name} combines the coordinates of the residual stream"):
        prunekit.hidden(randomized_model("granite"))


def test_norms_of_another_formula_are_refused(monkeypatch):
    norm = type(randomized_model("granite").model.norm)
    monkeypatch.setattr(norm, "forward", lambda self, x: nn.functional.normalize(x) * self.weight)
    with pytest.raises(ShapeError, match=r"layers.0.input_layernorm is no RMSNorm"):
        prunekit.hidden(randomized_model("granite"))


def test_an_epsilon_that_is_no_entry_is_refused(monkeypatch):
    model = randomized_model("granite")
    norm = type(model.model.norm)
    made_with = norm.__init__
    monkeypatch.setattr(norm, "__init__", lambda self, size, eps: made_with(self, size, 0.25))
    with pytest.raises(ShapeError, match=r"no entry of its config sets the epsilon .* 0.25"):
        prunekit.hidden(model)
