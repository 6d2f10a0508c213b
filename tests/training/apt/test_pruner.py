"""Windows in which whole attentions and feed-forwards may close."""

import pytest
import torch

import prunekit
from prunekit.config.apt_table import Apt
from prunekit.models.units.emptied import emptied
from prunekit.structured.parameter_budget import counted_parameters
from prunekit.training.apt.loop import apt
from prunekit.training.apt.pruner import AptPruner
from tests.support.adapters import PEFT_WARNS
from tests.support.units import EQUAL_DEPTH, batch, randomized_model, valid_logits

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(*PEFT_WARNS)

WINDOWS = {
    "parameters": 0.4, "rank": 2, "most_rank": 4, "warmup": 2, "window": 3, "windows": 3,
    "decay": 0.4, "steps": 12, "rate": 1e-3, "batch": 2, "held_out": 1, "every": 6,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "readers"),
    [
        ("bert", ["attention.output.dense", "output.dense"]),
        ("llama", ["self_attn.o_proj", "mlp.down_proj"]),
        ("t5", ["SelfAttention.o", "DenseReluDense.wo"]),
    ],
)
def test_least_zero_takes_layers_out_with_their_adapters(
    model_type, readers, monkeypatch, tmp_path
):
    model = randomized_model(model_type, **EQUAL_DEPTH.get(model_type, {}))
    given, differences = batch(model), []
    with torch.no_grad():
        for name, module in model.named_modules():
            if ".0." in name and any(name.endswith(reader) for reader in readers):
                module.get_parameter("weight").mul_(1e-6)
    cut = AptPruner.cut

    def measured(self):
        before = valid_logits(model, given)
        cut(self)
        differences.append(float((valid_logits(model, given) - before).abs().max()))

    monkeypatch.setattr(AptPruner, "cut", measured)
    kinds = ["heads", "neurons"] + ["hidden"] * (model_type != "bert")
    asked = Apt.model_validate({**WINDOWS, "least": 0, "kinds": kinds})
    whole = sum(each.numel() for each in counted_parameters(model, "blocks"))
    *_, last = apt(model, [given, given], [given], asked)
    assert max(differences) < 1e-5
    assert emptied(model, "heads")
    assert emptied(model, "neurons")
    left = sum(each.numel() for each in counted_parameters(model, "blocks"))
    assert left == last.details["parameters"] <= asked.parameters * whole
    model.save_pretrained(tmp_path)
    opened = prunekit.load(tmp_path)
    assert torch.equal(valid_logits(opened, given), valid_logits(model, given))


@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_uniform_keeps_as_many_in_every_layer_and_any_tool_opens_it(model_type, tmp_path):
    model = randomized_model(model_type)
    given = batch(model)
    asked = Apt.model_validate({**WINDOWS, "parameters": 0.5, "uniform": True})
    *_, last = apt(model, [given, given], [given], asked)
    for gates in (prunekit.heads(model), prunekit.neurons(model)):
        (count,) = {group.units for group in gates.groups}
        assert count < {"heads": 4, "neurons": 64}[gates.kind]
        gates.detach()
    assert last.details["parameters"] <= 0.5 * last.details["parameters"] / (1 - last.achieved)
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(valid_logits(opened, given), valid_logits(model, given))
